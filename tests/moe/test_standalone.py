"""The MoE layer in other people's models: without a mesh, in their own `shard_map`, under jit with
Explicit and with Auto axes, and beside plain nnx layers. The dense oracle says what is right.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config.model import MoEConfig
from moe_jax.errors import UserError
from moe_jax.moe.standalone import MoELayer
from moe_jax.parallel.sharding import specs
from moe_jax.placement.table import Placement, contiguous
from tests.support import oracle
from tests.support.slow import slow_unless

BATCH, LENGTH, WIDTH, EXPERTS, TOP_K = 8, 6, 16, 8, 2
AXES: dict[str, Any] = dict(data="batch", expert="model")
CONFIG = dict(num_experts=EXPERTS, top_k=TOP_K, hidden=8, dropless=True, shared_experts=1)
SPLIT = P(("batch", "model"))
TABLE = np.array([5, 2, 7, 0, 3, 6, 1, 4])


def make_layer(axes: dict[str, Any] | None = None, **changes: Any) -> MoELayer:
    config = MoEConfig(**CONFIG | dict(shared_gate=True, aux_loss=0.0, z_loss=0.0) | changes)
    return MoELayer(config, WIDTH, **AXES if axes is None else axes, rngs=nnx.Rngs(3))


def make_mesh(kind: AxisType) -> Mesh:
    return jax.make_mesh((2, 4), ("batch", "model"), axis_types=(kind,) * 2)


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    x, dy = (jnp.array(rng.standard_normal((BATCH, LENGTH, WIDTH)), jnp.float32) for _ in range(2))
    return x, jnp.array(rng.random((BATCH, LENGTH)) < 0.85), dy


def loss_of(layer: MoELayer, x: jax.Array, valid: jax.Array, dy: jax.Array) -> Any:
    y, stats = layer(x, valid)
    return jnp.sum(y * dy), (y, stats)


def gradients(graph: Any, state: Any, x: jax.Array, valid: jax.Array, dy: jax.Array) -> Any:
    """Gradients with respect to parameters and x, output, statistics."""

    def loss(params: Any, x: jax.Array) -> Any:
        return loss_of(nnx.merge(graph, params, rest), x, valid, dy)

    params, rest = nnx.split_state(state, nnx.Param, ...)
    grads, aux = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return *grads, *aux


def assert_equals_oracle(layer: MoELayer, inputs: Any, results: Any) -> None:
    x, valid, dy = inputs
    grads, dx, y, stats = results

    def named(tree: Any) -> dict[str, jax.Array]:
        tree = jax.tree.map(np.asarray, nnx.to_pure_dict(tree)["moe"])
        by_slot = np.argsort(layer.expert_in_slot.get_value())
        return {
            "router": tree["router"]["weight"],
            "gate_up": tree["experts"]["gate_up"][by_slot],
            "down": np.swapaxes(tree["experts"]["down"], -1, -2)[by_slot],
            "shared_gate_up": tree["shared_gate_up"],
            "shared_down": np.swapaxes(tree["shared_down"], -1, -2),
            "shared_gate": tree["shared_gate"],
        }

    def value(params: Any, x: jax.Array) -> jax.Array:
        flags = valid.reshape(-1).astype(jnp.float32)
        return oracle.moe_layer(params, x.reshape(-1, WIDTH), flags, TOP_K).reshape(x.shape)

    params = named(nnx.state(layer, nnx.Param))
    want, pull = jax.vjp(value, params, np.asarray(x))
    want_grads, want_dx = pull(np.asarray(dy))
    np.testing.assert_allclose(y, want, atol=2e-5)
    np.testing.assert_allclose(dx, want_dx, atol=1e-4)
    for name, gradient in named(grads).items():
        np.testing.assert_allclose(gradient, want_grads[name], atol=1e-4, err_msg=name)
    assert int(stats.kept) == TOP_K * int(valid.sum()) and int(stats.dropped) == 0
    assert int(stats.router.load_E.sum()) == TOP_K * int(valid.sum())


@pytest.mark.parametrize("axes", [{}, AXES], ids=["no axes", "axes that no mesh has"])
def test_one_device_without_a_mesh(inputs, axes):
    layer = make_layer(axes)
    graph, state = nnx.split(layer)
    results = jax.jit(lambda *args: gradients(graph, *args))(state, *inputs)
    assert_equals_oracle(layer, inputs, results)


@pytest.mark.parametrize(
    ("kind", "placed"),
    slow_unless(
        lambda case: case[1] == (case[0] is AxisType.Explicit),
        itertools.product([AxisType.Explicit, AxisType.Auto], [False, True]),
    ),
    ids=str,
)
def test_under_jit_on_a_mesh(inputs, kind, placed):
    layer, mesh = make_layer(dispatch="pooled", capacity_factor=0.7), make_mesh(kind)
    if placed:
        layer.place(Placement(TABLE[None], EXPERTS, 4))
    graph, state = nnx.split(layer)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(state))
    state = jax.device_put(state, shardings)
    down = state["moe"]["experts"]["down"].get_value()
    assert down.sharding.spec == P(("model",), None, None)
    x, valid, dy = (jax.device_put(a, NamedSharding(mesh, P("batch"))) for a in inputs)
    results = jax.jit(lambda *args: gradients(graph, *args))(state, x, valid, dy)
    if kind == AxisType.Explicit:  # where the output is sharded as the input was
        assert all(results[i].sharding.is_equivalent_to(x.sharding, 3) for i in (1, 2))
    assert int(results[3].rounds) > 1
    assert results[3].counts.sent_RR.shape == (4, 4)
    assert_equals_oracle(layer, inputs, results)


def test_under_set_mesh_with_arrays_that_are_nowhere_yet(inputs):
    layer, mesh = make_layer(), make_mesh(AxisType.Auto)
    graph, state = nnx.split(layer)
    with jax.set_mesh(mesh):
        results = jax.jit(lambda *args: gradients(graph, *args))(state, *inputs)
    assert_equals_oracle(layer, inputs, results)


def test_axes_that_split_tokens_alone(inputs):
    layer, mesh = make_layer(dict(data=("batch", "model"))), make_mesh(AxisType.Explicit)
    graph, state = nnx.split(layer)
    state = jax.device_put(state, NamedSharding(mesh, P()))
    arrays = (jax.device_put(a, NamedSharding(mesh, P("batch"))) for a in inputs)
    results = jax.jit(lambda *args: gradients(graph, *args))(state, *arrays)
    assert results[3].counts.sent_RR.shape == (1, 1)
    assert_equals_oracle(layer, inputs, results)


def test_a_call_outside_jit(inputs):
    layer, mesh = make_layer(), make_mesh(AxisType.Explicit)
    x, valid, _ = (jax.device_put(a, NamedSharding(mesh, P("batch"))) for a in inputs)
    graph, state = nnx.split(layer)
    placed = jax.device_put(
        state, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(state))
    )
    y, _ = nnx.merge(graph, placed)(x, valid)
    want, _ = layer(*inputs[:2])
    np.testing.assert_allclose(y, want, atol=2e-5)


@pytest.mark.parametrize("tokens", [P(("batch", "model")), P("batch")], ids=["split", "same"])
def test_inside_a_shard_map_of_the_caller(inputs, tokens):
    """On the `model` axis tokens may be split, or the same on all devices."""
    layer, mesh = make_layer(), make_mesh(AxisType.Auto)
    graph, state = nnx.split(layer)

    def local(state: Any, x: jax.Array, valid: jax.Array, dy: jax.Array) -> Any:
        def loss(params: Any, x: jax.Array) -> Any:
            total, aux = loss_of(nnx.merge(graph, params, rest), x, valid, dy)
            return jax.lax.psum(
                total, tuple(a for part in tokens for a in np.atleast_1d(part))
            ), aux

        params, rest = nnx.split_state(state, nnx.Param, ...)
        grads, aux = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return *grads, *aux

    state_specs = specs(state)
    params_specs = specs(nnx.state(layer, nnx.Param))
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(state_specs, tokens, tokens, tokens),
        out_specs=(params_specs, tokens, tokens, P()),
    )
    assert_equals_oracle(layer, inputs, jax.jit(sharded)(state, *inputs))


class Model(nnx.Module):
    """Plain layers around two mixtures."""

    def __init__(self, rngs: nnx.Rngs):
        config = MoEConfig(num_experts=4, top_k=2, hidden=8)
        self.into = nnx.Linear(3, WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.layers = nnx.List([MoELayer(config, WIDTH, **AXES, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(
            WIDTH, 1, rngs=rngs, kernel_metadata=dict(out_sharding=("model", None), mesh=None)
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h, losses = self.drop(self.into(x)), jnp.float32(0)
        for layer in self.layers:
            y, stats = layer(h)
            h, losses = h + y, losses + stats.aux_loss + stats.z_loss
        return self.out(h), losses


@pytest.mark.parametrize(
    "kind",
    slow_unless(lambda kind: kind is AxisType.Explicit, [None, AxisType.Explicit, AxisType.Auto]),
    ids=str,
)
def test_a_model_of_plain_layers_and_mixtures_trains(kind):
    with nnx.use_eager_sharding(False):
        model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(1), (8, 5, 3))
    target = jnp.sum(x, axis=-1, keepdims=True) ** 2
    if kind is not None:
        mesh = make_mesh(kind)
        for module in (model, optimizer):
            state = nnx.state(module)
            own = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(state))
            if kind == AxisType.Explicit:  # a matmul that contracts a sharded dim needs a choice
                own = jax.tree.map(
                    lambda s: s if "model" not in s.spec else NamedSharding(mesh, P()), own
                )
            nnx.update(module, jax.device_put(state, own))
        x, target = (jax.device_put(a, NamedSharding(mesh, P("batch"))) for a in (x, target))

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer, x: jax.Array, target: jax.Array) -> jax.Array:
        def loss(model: Model) -> jax.Array:
            y, losses = model(x)
            return jnp.mean((y - target) ** 2) + losses

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer, x, target)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0], losses


def test_specs_of_plain_variables():
    with nnx.use_eager_sharding(False):
        found = specs(nnx.state(Model(nnx.Rngs(0))))
    assert found["into"]["kernel"] == P()
    assert found["out"]["kernel"] == P("model", None)
    assert found["layers"][0]["moe"]["experts"]["gate_up"] == P(("model",), None, None, None)
    assert found["layers"][0]["moe"]["router"]["weight"] == P(None, None)
    assert found["layers"][0]["expert_in_slot"] == P()


def test_moved_experts_change_no_output_and_moments_can_follow(inputs):
    layer = make_layer({})
    x, valid, _ = inputs
    before, _ = layer(x, valid)
    experts = layer.moe.experts.down.get_value()
    moment = np.arange(EXPERTS)
    for slots in (TABLE, TABLE[::-1]):
        moment = moment[layer.place(Placement(slots[None], EXPERTS, 4))]
        np.testing.assert_array_equal(moment, slots)
        np.testing.assert_array_equal(layer.moe.experts.down.get_value(), experts[moment])
        np.testing.assert_array_equal(layer(x, valid)[0], before)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_experts_move_between_devices(inputs, kind):
    layer, mesh = make_layer(), make_mesh(kind)
    experts = np.asarray(layer.moe.experts.gate_up.get_value())
    state = nnx.state(layer)
    own = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(state))
    nnx.update(layer, jax.device_put(state, own))
    before = layer.moe.experts.gate_up.get_value().sharding
    layer.place(Placement(TABLE[None], EXPERTS, 4))
    moved = layer.moe.experts.gate_up.get_value()
    np.testing.assert_array_equal(moved, experts[TABLE])
    assert moved.sharding == before


def test_the_bias_moves_against_the_load(inputs):
    layer = make_layer({}, bias_rate=0.05)
    stats = layer(inputs[0])[1]
    load = np.asarray(stats.router.load_E)
    layer.update_bias(stats)
    bias = np.asarray(layer.balance_bias.get_value())
    np.testing.assert_allclose(bias, 0.05 * np.sign(load.mean() - load), rtol=1e-6)
    after = np.asarray(layer(inputs[0])[1].router.load_E)
    assert after[load.argmax()] < load.max() and after[load.argmin()] > load.min()


def test_noise_is_the_same_with_and_without_a_mesh(inputs):
    x, mesh = inputs[0], make_mesh(AxisType.Explicit)
    layer = make_layer(expert_dropout=0.4)
    graph, state = nnx.split(layer)
    key = jax.random.key(5)
    noisy, plain = layer(x, key=key)[0], layer(x)[0]
    assert not np.allclose(noisy, plain)
    spread = jax.device_put(x, NamedSharding(mesh, P("batch")))
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x, key=key)[0])
    state = jax.device_put(state, NamedSharding(mesh, P()))
    np.testing.assert_allclose(run(state, spread), noisy, atol=2e-5)


def on_mesh(layer: MoELayer, x: jax.Array, **options: Any) -> Any:
    """One pass inside a caller's shard_map."""
    graph, state = nnx.split(layer)
    mesh = make_mesh(AxisType.Auto)
    run = jax.shard_map(
        lambda state, x: nnx.merge(graph, state)(x)[0],
        mesh=mesh,
        **dict(in_specs=(specs(state), SPLIT), out_specs=SPLIT) | options,
    )
    return jax.jit(run)(state, x)


def test_what_cannot_be_is_refused_in_a_sentence(inputs):
    x = inputs[0]
    spread = jax.device_put(x, NamedSharding(make_mesh(AxisType.Auto), P()))
    with pytest.raises(UserError, match="no axis 'rank': its axes are batch, model"):
        jax.jit(lambda x: make_layer(dict(expert="rank"))(x)[0])(spread)
    with pytest.raises(UserError, match="do not divide num_experts=6"):
        jax.jit(lambda x: make_layer(num_experts=6)(x)[0])(spread)
    with pytest.raises(UserError, match="3 sequences do not divide"):
        jax.jit(lambda x: make_layer()(x[:3])[0])(spread)
    with pytest.raises(UserError, match="3 sequences do not divide"):
        on_mesh(make_layer(), x[:3], in_specs=(specs(nnx.state(make_layer())), P()))
    with pytest.raises(UserError, match="a device has 8 of 8 experts"):
        on_mesh(make_layer(), x, in_specs=(P(), SPLIT))
    with pytest.raises(UserError, match="check_vma=True"):
        on_mesh(make_layer(), x, check_vma=False)
    with pytest.raises(UserError, match="has axis 'batch' and not 'model'"):
        on_mesh(
            make_layer(),
            x,
            axis_names={"batch"},
            in_specs=(P(), P("batch")),
            out_specs=P("batch"),
        )
    with pytest.raises(UserError, match="aux_over=model"):
        make_layer(aux_over="model")
    with pytest.raises(UserError, match="for 2 layers and 8 slots"):
        make_layer().place(contiguous(2, EXPERTS, 4))
