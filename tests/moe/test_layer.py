"""Invariants 1 and 4: the layer equals a dense oracle, in value and every gradient, however tokens
travel to experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config.model import MoEConfig
from moe_jax.config.schema import MeshConfig
from moe_jax.moe.exchange import Route
from moe_jax.moe.layer import MoE
from moe_jax.moe.stats import LayerStats
from moe_jax.moe.tables import LayerTables
from moe_jax.parallel.collectives import BATCH_AXES, MESH_AXES
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.sharding import specs
from moe_jax.placement.table import EMPTY, Placement, contiguous
from moe_jax.runtime import platform
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("strict_promotion")

BATCH, LENGTH, WIDTH, HIDDEN, EXPERTS, TOP_K = 8, 6, 16, 8, 8, 2
TOKENS = BATCH * LENGTH


class Case(NamedTuple):
    x: jax.Array
    valid: jax.Array
    dy: jax.Array
    params: dict[str, jax.Array]  # in logical order


@pytest.fixture(scope="module")
def case() -> Case:
    rng = np.random.default_rng(0)
    shapes = {
        "router": (WIDTH, EXPERTS),
        "gate_up": (EXPERTS, WIDTH, 2, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH),
        "shared_gate_up": (WIDTH, 2, HIDDEN),
        "shared_down": (HIDDEN, WIDTH),
        "shared_gate": (WIDTH, 1),
    }
    params = {
        name: jnp.array(0.4 * rng.standard_normal(shape), jnp.float32)
        for name, shape in shapes.items()
    }
    x, dy = (jnp.array(rng.standard_normal((BATCH, LENGTH, WIDTH)), jnp.float32) for _ in range(2))
    return Case(x, jnp.array(rng.random((BATCH, LENGTH)) < 0.85), dy, params)


def in_slots(weights: jax.Array, table: np.ndarray) -> np.ndarray:
    """Experts' weights in slot order; EMPTY, -1, takes the row of zeros at the end."""
    return np.concatenate([weights, np.zeros_like(weights[:1])])[table]


def transposed(tree: dict[str, Any]) -> dict[str, Any]:
    """The oracle's down projections are [F, D], the layer's [D, F]."""
    return {
        name: np.swapaxes(a, -1, -2) if name.endswith("down") else a for name, a in tree.items()
    }


class Layer:
    """A MoE layer on a mesh, compiled: (case, bias) -> output, figures, and gradients in logical
    order.
    """

    def __init__(self, mesh: MeshConfig, placement: Placement, **settings: Any):
        self.config = MoEConfig(
            num_experts=placement.num_experts,
            top_k=TOP_K,
            hidden=HIDDEN,
            shared_experts=1,
            shared_gate=True,
            **settings,
        )
        self.placement = placement

        def make():
            return MoE(self.config, WIDTH, 1.0, rngs=nnx.Rngs(0))

        graph, variables = nnx.split(nnx.eval_shape(make))
        param_specs, spread = nnx.to_pure_dict(specs(variables)), P(BATCH_AXES)

        def local(params, x, valid, tables, dy):
            def loss(params, x):
                y, stats = nnx.merge(graph, params)(x, valid, tables)
                return jax.lax.psum(jnp.sum(y * dy), BATCH_AXES), (y, stats)

            grads, (y, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
            return y, stats, grads

        in_specs = (param_specs, spread, spread, P(), spread)
        out_specs = (spread, P(), (param_specs, spread))
        self.run = jax.jit(
            jax.shard_map(local, mesh=make_mesh(mesh), in_specs=in_specs, out_specs=out_specs)
        )

    def __call__(
        self, case: Case, bias=None, placement: Placement | None = None
    ) -> tuple[jax.Array, LayerStats, dict[str, Any]]:
        placement = placement or self.placement
        table, p = placement.physical_to_logical[0], transposed(case.params)
        bias = jnp.zeros(placement.num_experts) if bias is None else jnp.array(bias, jnp.float32)
        params = {
            "router": {"weight": p["router"]},
            "experts": {name: in_slots(p[name], table) for name in ("gate_up", "down")},
            **{name: p[name] for name in ("shared_gate_up", "shared_down", "shared_gate")},
        }
        tables = LayerTables(*(jnp.array(a[0]) for a in placement.routing()), bias)
        y, stats, (grads, dx) = self.run(params, case.x, case.valid, tables, case.dy)
        experts = {name: np.asarray(g) for name, g in grads.pop("experts").items()}
        assert all(not np.any(g[table == EMPTY]) for g in experts.values())
        by_expert = {
            n: np.stack([g[table == e].sum(0) for e in range(placement.num_experts)])
            for n, g in experts.items()
        }
        return (
            y,
            stats,
            {"x": dx, "router": grads.pop("router")["weight"], **transposed(grads | by_expert)},
        )


@jax.jit
def expected(case: Case, bias=0.0, kept_NE=1.0) -> tuple[jax.Array, dict[str, Any]]:
    """The oracle's output and gradients."""

    def value(params, x):
        y = oracle.moe_layer(
            params,
            x.reshape(-1, WIDTH),
            case.valid.reshape(-1).astype(jnp.float32),
            TOP_K,
            bias,
            kept_NE,
        )
        return y.reshape(x.shape)

    y, pull = jax.vjp(value, case.params, case.x)
    grads, dx = pull(case.dy)
    return y, {"x": dx, **grads}


@jax.jit
def expected_by_sequence(case: Case) -> tuple[jax.Array, dict[str, Any]]:
    """The oracle's, where the tokens of a sequence are all routed by the mean of its valid ones."""

    def value(params, x):
        counts = case.valid[..., None].astype(jnp.float32)
        means = jnp.sum(x * counts, axis=1) / jnp.maximum(jnp.sum(counts, axis=1), 1.0)
        y = oracle.moe_layer(
            params,
            x.reshape(-1, WIDTH),
            case.valid.reshape(-1).astype(jnp.float32),
            TOP_K,
            seen_ND=jnp.repeat(means, LENGTH, axis=0),
        )
        return y.reshape(x.shape)

    y, pull = jax.vjp(value, case.params, case.x)
    grads, dx = pull(case.dy)
    return y, {"x": dx, **grads}


def assert_equal(got: tuple[Any, Any, Any], want: tuple[Any, Any]) -> None:
    np.testing.assert_allclose(got[0], want[0], atol=2e-5, err_msg="output")
    assert got[2].keys() == want[1].keys()
    for name, gradient in want[1].items():
        np.testing.assert_allclose(got[2][name], gradient, atol=1e-4, err_msg=f"gradient of {name}")


def table(*slots: int, ranks: int = 1) -> Placement:
    return Placement(np.array([slots], np.int32), EXPERTS, ranks)


SHUFFLED = (5, 2, 7, 0, 3, 6, 1, 4)
REPLICAS = (
    5,
    2,
    0,
    7,
    0,
    3,
    3,
    6,
    1,
    0,
    4,
    EMPTY,
)  # expert 0 in three slots, 3 in two, one slot empty
MANY = dict(dispatch="pooled", dropless=True)

LAYERS = {
    "1x1, alone": (MeshConfig(), table(*range(8)), dict(dropless=True)),
    "1x1, pooled in rounds": (MeshConfig(), table(*SHUFFLED), dict(**MANY, capacity_factor=0.4)),
    "8x1, reference matmul": (
        MeshConfig(data=8),
        table(*SHUFFLED, EMPTY),
        dict(**MANY, grouped_matmul="reference"),
    ),
    "1x8, rounds": (
        MeshConfig(expert=8),
        table(*SHUFFLED, ranks=8),
        dict(**MANY, capacity_factor=0.7),
    ),
    "2x4, large pools": (
        MeshConfig(data=2, expert=4),
        table(*REPLICAS, ranks=4),
        dict(dispatch="pooled", capacity_factor=50.0, overlap_chunks=5),
    ),
    "2x4, gathered": (
        MeshConfig(data=2, expert=4),
        table(*REPLICAS, ranks=4),
        dict(dispatch="gather"),
    ),
    "2x2x2, rounds": (
        MeshConfig(data=2, expert=2, tensor=2),
        table(*SHUFFLED, ranks=2),
        dict(**MANY, capacity_factor=0.3, overlap_chunks=3),
    ),
    "1x4x2, gathered, ragged matmul": (
        MeshConfig(expert=4, tensor=2),
        table(*range(8), ranks=4),
        dict(dispatch="gather", grouped_matmul="ragged"),
    ),
}


QUICK = ("1x1, alone", "1x8, rounds", "2x2x2, rounds", "1x4x2, gathered, ragged matmul")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(layer, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, layer in LAYERS.items()
    ],
)
def layer(request) -> Layer:
    mesh, placement, settings = request.param
    return Layer(mesh, placement, **settings)


@pytest.mark.parametrize("name", ["1x1, alone", "2x2x2, rounds"])
def test_one_route_per_sequence_is_taken_by_all_its_tokens(case, name):
    mesh, placement, settings = LAYERS[name]
    case = case._replace(valid=case.valid.at[3].set(False))  # a sequence of padding
    got = Layer(mesh, placement, **settings, route_by="sequence", aux_loss=1.0)(case)
    assert_equal(got, expected_by_sequence(case))
    stats, tokens = got[1], int(case.valid.sum())
    # Load and losses count the seven sequences, rows on the way their tokens.
    assert (stats.router.tokens, stats.router.load_E.sum()) == (7, 7 * TOP_K)
    assert (stats.kept, stats.dropped) == (tokens * TOP_K, 0)
    assert stats.counts.traffic_RE.sum() == stats.counts.slot_load_P.sum() == tokens * TOP_K
    share, prob = (a / a.sum() for a in (stats.router.load_E, stats.router.prob_E))
    np.testing.assert_allclose(stats.aux_loss, EXPERTS * jnp.sum(share * prob), rtol=1e-5)


def test_layer_equals_the_oracle_for_even_and_skewed_load(layer, case):
    """The second run sends every token to experts 0 and 3: the longest line there is."""
    choices = TOP_K * int(case.valid.sum())
    for bias in (None, [9.0, 0, 0, 5.0, 0, 0, 0, 0]):
        y, stats, grads = layer(case, bias)
        assert_equal((y, stats, grads), expected(case, 0.0 if bias is None else jnp.array(bias)))
        assert (stats.kept, stats.dropped) == (choices, 0)
        assert stats.router.load_E.sum() == choices
    assert stats.router.load_E.tolist() == [choices // 2, 0, 0, choices // 2, 0, 0, 0, 0]
    if layer.config.dropless and layer.config.capacity_factor < 1:
        assert stats.rounds > 1
    unused = np.array([1, 2, 4, 5, 6, 7])
    assert not np.any(np.asarray(grads["gate_up"])[unused]) and not np.any(
        np.asarray(grads["down"])[unused]
    )


def kept_choices(
    case: Case, placement: Placement, data: int, ranks: int, capacity: int
) -> np.ndarray:
    """Which choices [N, E] find room, by the documented priority, source by source."""
    expert, weight = (
        np.asarray(a)
        for a in jax.jit(oracle.choices, static_argnums=2)(
            case.params, case.x.reshape(-1, WIDTH), TOP_K
        )
    )
    slot_of = placement.logical_to_physical()[0, :, 0]
    local, kept = TOKENS // (data * ranks), np.zeros((TOKENS, EXPERTS))
    for source in range(data * ranks):
        tokens = [
            n for n in range(source * local, (source + 1) * local) if case.valid.reshape(-1)[n]
        ]
        for rank in range(ranks):
            line = [(k, -weight[n, k], n) for n in tokens for k in range(TOP_K)]
            line = [
                c
                for c in sorted(line)
                if slot_of[expert[c[2], c[0]]] // (placement.num_slots // ranks) == rank
            ]
            for k, _, n in line[:capacity]:
                kept[n, expert[n, k]] = 1.0
    return kept


@pytest.mark.parametrize(
    ("data", "ranks", "factor", "capacity"),
    [pytest.param(1, 1, 0.25, 24, marks=pytest.mark.slow), (2, 4, 0.5, 2)],
)
def test_a_capacity_drops_the_least_wanted_and_counts_them(case, data, ranks, factor, capacity):
    placement = table(*SHUFFLED, ranks=ranks)
    settings = dict(dispatch="pooled", capacity_factor=factor, overlap_chunks=2)
    y, stats, grads = Layer(MeshConfig(data=data, expert=ranks), placement, **settings)(case)
    kept = kept_choices(case, placement, data, ranks, capacity)
    assert_equal((y, stats, grads), expected(case, kept_NE=jnp.array(kept, jnp.float32)))
    assert stats.kept == int(kept.sum())
    assert stats.kept + stats.dropped == TOP_K * int(case.valid.sum())
    assert stats.dropped > 10


def test_empty_slots_where_the_axis_does_not_divide_the_experts(case):
    """Six experts on four ranks: eight slots, two of them empty."""
    fewer = {
        n: a[..., :6] if n == "router" else a[:6] if n in ("gate_up", "down") else a
        for n, a in case.params.items()
    }
    case = case._replace(params=fewer)
    got = Layer(MeshConfig(data=2, expert=4), contiguous(1, 6, 4), **MANY)(case)
    assert_equal(got, expected(case))
    assert got[1].dropped == 0


def test_another_placement_compiles_nothing_and_changes_nothing(case):
    layer = Layer(MeshConfig(expert=4), table(*REPLICAS, ranks=4), **MANY)
    first = layer(case)
    for slots in (
        (0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 0),
        (1, 0, 2, 1, 3, 7, 6, 5, 1, 4, 5, 6),
        (*SHUFFLED, *[EMPTY] * 4),
    ):
        y, stats, grads = layer(case, placement=table(*slots, ranks=4))
        assert_equal((y, stats, grads), (first[0], first[2]))
        np.testing.assert_array_equal(stats.router.load_E, first[1].router.load_E)
    assert layer.run._cache_size() == 1


@pytest.mark.slow
def test_half_precision_is_close(case):
    layer = Layer(MeshConfig(expert=4), table(*SHUFFLED, ranks=4), **MANY)
    half = case._replace(x=case.x.astype(jnp.bfloat16), dy=case.dy.astype(jnp.bfloat16))
    y, stats, grads = layer(half)
    assert y.dtype == grads["x"].dtype == jnp.bfloat16 and grads["gate_up"].dtype == jnp.float32
    exact = case._replace(x=half.x.astype(jnp.float32), dy=half.dy.astype(jnp.float32))
    want, want_grads = expected(exact)
    np.testing.assert_allclose(y.astype(np.float32), want, atol=0.05, rtol=0.02)
    np.testing.assert_allclose(grads["down"], want_grads["down"], atol=0.2, rtol=0.05)
    assert stats.dropped == 0


def test_pools_are_cut_where_the_platform_computes_while_they_travel(monkeypatch):
    def rows_at_once(capacity: int, ranks: int, chunks: int | None = None) -> int:
        config = MoEConfig(overlap_chunks=chunks)
        route = Route(MESH_AXES, ranks, 1, 1.0, None, "auto", config.overlap_chunks)
        return route.chunk(capacity, row_bytes=4096)

    assert rows_at_once(2560, 16) == 2560
    assert (rows_at_once(2560, 16, 4), rows_at_once(10, 16, 4)) == (640, 3)
    assert (rows_at_once(100, 16, 3), rows_at_once(2, 16, 7)) == (48, 1)  # in rows of 16
    record = dataclasses.replace(platform.default_platform(), overlaps=True)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", record)
    assert rows_at_once(2560, 16) == 640  # 168 MB in four
    assert rows_at_once(256, 16) == 256  # 17 MB: one chunk
    assert rows_at_once(2560, 1) == 2560  # nothing travels
