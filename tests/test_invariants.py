"""The invariants of docs/architecture.md that span a whole training step. (1 and 4 for a layer are
in moe/test_layer.py.)
"""

from __future__ import annotations

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.placement.table import Placement, contiguous
from moe_jax.training.state import StepStats, TrainState
from moe_jax.training.step import TrainProgram
from tests.support.tiny_programs import EXPERTS, TOP_K, make_batch, make_program, moved

# Everything that could depend on how a batch is cut: all losses, noise, and the bias that follows
# the load.
MOE = dict(
    aux_loss=0.1,
    sequence_aux_loss=0.2,
    variance_loss=0.1,
    z_loss=0.1,
    bias_rate=0.05,
    input_noise=0.1,
    expert_dropout=0.2,
    shared_experts=1,
    dispatch="pooled",
)
STEPS = 3


def run(
    program: TrainProgram, state: TrainState | None = None, steps: int = STEPS
) -> tuple[TrainState, list[StepStats]]:
    """Steps on a new batch each, from a state or the initial one; figures as numpy."""
    state = program.init(7) if state is None else state
    figures = []
    for step in range(steps):
        state, measured = program.train_step(state, program.shard(make_batch(step)))
        figures.append(jax.tree.map(np.asarray, measured))
    return state, figures


def assert_same(got: list[StepStats], want: list[StepStats]) -> None:
    """Losses and gradient norms within 1e-5, counts exactly."""
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        for name in ("loss", "grad_norm", "lr"):
            np.testing.assert_allclose(
                getattr(a, name), getattr(b, name), rtol=1e-5, err_msg=f"{name} of step {step}"
            )
        for name in ("ce_loss", "aux_loss", "z_loss"):
            np.testing.assert_allclose(
                getattr(a, name),
                getattr(b, name),
                rtol=1e-5,
                err_msg=f"{name} of step {step}",
            )
        ours, theirs = a.layers, b.layers
        np.testing.assert_array_equal(ours.router.load_E, theirs.router.load_E)
        np.testing.assert_array_equal(ours.router.tokens, theirs.router.tokens)
        np.testing.assert_array_equal(ours.kept, theirs.kept)
        np.testing.assert_array_equal(ours.dropped, theirs.dropped)
        for name in ("prob_E", "z", "entropy", "sequence_aux"):
            np.testing.assert_allclose(
                getattr(ours.router, name), getattr(theirs.router, name), rtol=1e-4, err_msg=name
            )


@pytest.fixture(scope="module")
def alone() -> tuple[TrainState, list[StepStats]]:
    """One device, no exchange: what every other run must equal."""
    return run(make_program(moe=MOE | dict(dispatch="auto")))


def test_every_choice_of_a_counted_token_is_kept(alone):
    for step, measured in enumerate(alone[1]):
        layers, tokens = measured.layers, int((make_batch(step)["segments"] > 0).sum())
        np.testing.assert_array_equal(layers.router.tokens, tokens)
        np.testing.assert_array_equal(layers.kept, TOP_K * tokens)
        np.testing.assert_array_equal(layers.dropped, 0)
        np.testing.assert_array_equal(layers.router.load_E.sum(axis=1), TOP_K * tokens)
        assert measured.skipped == 0


MESHES = {
    "8x1": ((8, 1, 1), 1, 1.25),
    "1x8": ((1, 8, 1), 1, 1.25),
    "2x4 in 2 parts": ((2, 4, 1), 2, 1.25),
    "4x2 in rounds": ((4, 2, 1), 1, 0.3),
    "2x2x2": ((2, 2, 2), 1, 1.25),
    "1x1 in 4 parts": ((1, 1, 1), 4, 0.5),
}


@pytest.mark.parametrize(
    ("mesh", "accumulation", "capacity"),
    [
        pytest.param(*case, id=name, marks=[] if name == "2x2x2" else [pytest.mark.slow])
        for name, case in MESHES.items()
    ],
)
def test_the_mesh_and_the_parts_of_a_batch_change_nothing(
    alone, mesh, accumulation, capacity, monkeypatch
):
    # Small as the head is, the loss splits its vocabulary where that is less: on 2x4, over `data`.
    monkeypatch.setattr("moe_jax.models.head.SMALL", 0)
    program = make_program(
        *mesh, accumulation=accumulation, moe=MOE | dict(capacity_factor=capacity)
    )
    state, figures = run(program)
    assert_same(figures, alone[1])
    if capacity < 1:
        assert max(f.layers.rounds.max() for f in figures) > 1
    # Parameters after three steps: Adam's first steps magnify the noise of gradients near zero, so
    # not to the last digit.
    close = jax.tree.map(
        lambda a, b: np.mean(np.abs(np.asarray(a) - np.asarray(b)) < 1e-4),
        state.params,
        alone[0].params,
    )
    assert min(jax.tree.leaves(close)) > 0.95, close
    np.testing.assert_allclose(state.tables.bias_E, alone[0].tables.bias_E, atol=1e-6)


@pytest.mark.parametrize("parts", [pytest.param(1, id="whole"), pytest.param(2, id="in 2 parts")])
@pytest.mark.slow
def test_a_loss_pooled_over_layers_does_not_depend_on_the_mesh_or_the_parts(parts):
    moe = dict(aux_loss=0.5, aux_over="model", z_loss=0.0)
    (_, (want,)), (_, (got,)) = (
        run(program, steps=1)
        for program in (
            make_program(moe=moe),
            make_program(2, 2, moe=moe | dict(dispatch="pooled"), accumulation=parts),
        )
    )
    assert_same([got], [want])
    stats = want.layers.router
    share, prob = (
        np.mean(a / a.sum(axis=1, keepdims=True), axis=0) for a in (stats.load_E, stats.prob_E)
    )
    np.testing.assert_allclose(want.aux_loss, 0.5 * EXPERTS * np.sum(share * prob), rtol=1e-5)


@pytest.mark.slow
def test_routes_of_sequences_do_not_depend_on_the_mesh_or_the_parts():
    """No noise, and a loss of half-filled batches: all of it is counted in sequences."""
    moe = dict(aux_loss=0.1, sequence_aux_loss=0.2, z_loss=0.1, route_by="sequence")
    (alone, (want,)), (meshed, (got,)) = (
        run(program, steps=1)
        for program in (
            make_program(moe=moe),
            make_program(2, 4, moe=moe | dict(dispatch="pooled"), accumulation=2),
        )
    )
    assert_same([got], [want])
    np.testing.assert_array_equal(want.layers.router.tokens, len(make_batch(0)["tokens"]))
    # The first moments are a tenth of the gradients, which the whole batch gives alike.
    for one, other in zip(
        jax.tree.leaves(alone.opt_state[0].mu),
        jax.tree.leaves(meshed.opt_state[0].mu),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)


# Layers dense, then MoE and dense in turn, then MoE: two stacks, of which the first holds a pattern
# of two.
PATTERN = dict(num_layers=5, sliding_window=4, window_every=2)
PATTERN_MOE = dict(num_experts=4, first_dense=1, dense_layers=(2,), aux_loss=0.1, dispatch="pooled")


@pytest.fixture(scope="module")
def pattern_program() -> TrainProgram:
    return make_program(moe=PATTERN_MOE | dict(dispatch="auto"), model=PATTERN)


@pytest.fixture(scope="module")
def pattern(pattern_program) -> tuple[TrainState, list[StepStats]]:
    return run(pattern_program)


@pytest.fixture(scope="module")
def program() -> TrainProgram:
    """Twelve slots for eight experts."""
    return make_program(2, 4, moe=MOE, redundant=1)


@pytest.fixture
def start(program, initial) -> TrainState:
    """A state that the test may give away."""
    return jax.device_put(initial, program.state_shardings)


@pytest.fixture(scope="module")
def initial(program) -> TrainState:
    return jax.tree.map(np.array, program.init(7))


class TestPlacement:
    """Invariant 3: tables are data."""

    @pytest.mark.parametrize("kind", ["contiguous", "shuffled", "replicas", "no replicas"])
    def test_losses_are_the_same_and_nothing_compiles(self, alone, program, start, kind):
        rng = np.random.default_rng(3)
        own = program.placement.physical_to_logical
        tables = {
            "contiguous": own,
            "shuffled": np.stack(
                [
                    row.reshape(4, 3)[rng.permutation(4)][:, rng.permutation(3)].reshape(-1)
                    for row in own
                ]
            ),
            "replicas": np.array(
                [[4, 0, 7, 4, 1, 2, 4, 3, 5, 4, 6, -1], [0, 3, 1, 0, 4, 1, 0, 5, 2, 6, 7, 2]]
            ),
            "no replicas": np.array([[-1, *range(4), -1, -1, *range(4, 8), -1]] * 2),
        }
        state = moved(program, start, Placement(tables[kind], EXPERTS, 4))
        state, figures = run(program, state)
        assert_same(figures, alone[1])
        assert program.train_step._cache_size() == 1
        # Replicas of an expert, and empty slots, stay what they are.
        for layer, table in enumerate(tables[kind]):
            down = np.asarray(
                state.params["stacks"][0]["blocks"][0]["mlp"]["experts"]["down"][layer]
            )
            for expert in range(EXPERTS):
                held = down[table == expert]
                np.testing.assert_array_equal(held, np.broadcast_to(held[0], held.shape))
            assert not np.any(down[table == -1])

    def test_moving_experts_in_the_middle_of_a_run_changes_nothing(self, alone, program, start):
        state, before = run(program, start, steps=1)
        swapped = Placement(
            np.stack([np.roll(row, 6) for row in program.placement.physical_to_logical]), EXPERTS, 4
        )
        state = moved(program, state, swapped)
        figures = list(before)
        for step in range(1, STEPS):
            state, measured = program.train_step(state, program.shard(make_batch(step)))
            figures.append(jax.tree.map(np.asarray, measured))
        assert_same(figures, alone[1])
        assert program.train_step._cache_size() == 1

    def test_same_seed_same_mesh_bitwise_the_same(self, program, initial):
        """Invariant 8."""
        jax.tree.map(
            np.testing.assert_array_equal,
            *(
                run(program, jax.device_put(initial, program.state_shardings), steps=2)
                for _ in range(2)
            ),
        )

    def test_another_seed_is_another_run(self, program, start, initial):
        """Of initial values, and of noise: a state whose seed alone differs makes other choices."""
        other = jax.device_put(initial, program.state_shardings)
        _, first = run(program, start, steps=1)
        other = other._replace(seed=jax.device_put(jnp.uint32(8), program.state_shardings.seed))
        _, second = run(program, other, steps=1)
        assert np.any(first[0].layers.router.load_E != second[0].layers.router.load_E)
        assert not np.array_equal(initial.params["embedding"], program.init(8).params["embedding"])

    def test_all_tokens_to_two_experts_drops_none(self, program, start):
        """Invariant 4 at its worst: every token of both layers wants experts 2 and 3, which one
        device holds.
        """
        bias = np.zeros((2, EXPERTS), np.float32)
        bias[:, 2:4] = 5.0
        state = start._replace(
            tables=start.tables._replace(
                bias_E=jax.device_put(bias, program.state_shardings.tables.bias_E)
            )
        )
        _, (measured,) = run(program, state, steps=1)
        layers = measured.layers
        np.testing.assert_array_equal(layers.kept, TOP_K * layers.router.tokens)
        np.testing.assert_array_equal(layers.dropped, 0)
        assert layers.rounds.min() > 2
        # Dropout may send some elsewhere.
        assert np.all(layers.router.load_E[:, 2:4].sum(axis=1) > 0.6 * layers.kept)

    @pytest.mark.parametrize("where", ["batch", "parameters"])
    def test_a_step_that_is_not_finite_changes_nothing_but_counts(self, program, start, where):
        state, _ = run(program, start, steps=1)
        batch = make_batch(1)
        if where == "batch":
            batch["mask"][3, 1] = np.nan
        else:
            scale = state.params["final_norm"]["scale"]
            broken = np.array(scale)
            broken[5] = np.inf
            # Put as the state is: what an eager operation returns may lie on another test's mesh,
            # and compile anew.
            state.params["final_norm"]["scale"] = jax.device_put(broken, scale.sharding)
        before = jax.tree.map(np.array, state)
        state, measured = program.train_step(state, program.shard(batch))
        assert (measured.skipped, measured.skipped_in_row) == (1, 1)
        for name in ("params", "opt_state", "tables", "expert_LP", "seed"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
        assert state.step == before.step + 1
        if where == "batch":
            state, measured = program.train_step(state, program.shard(make_batch(2)))
            assert (measured.skipped, measured.skipped_in_row) == (1, 0)
            assert np.isfinite(measured.loss)
            assert not np.array_equal(state.params["embedding"], before.params["embedding"])
        assert program.train_step._cache_size() == 1

    def test_evaluation_sums_the_plain_loss_without_noise(self, program, start):
        state, batch = start, make_batch(0)
        total, count = program.eval_step(state.params, state.tables, program.shard(batch))
        assert count == batch["mask"].sum()
        again, _ = program.eval_step(state.params, state.tables, program.shard(batch))
        assert total == again
        halves = [
            {name: a[rows] for name, a in batch.items()} for rows in (slice(0, 8), slice(8, 16))
        ]
        parts = [
            program.eval_step(state.params, state.tables, program.shard(half)) for half in halves
        ]
        np.testing.assert_allclose(sum(t for t, _ in parts), total, rtol=1e-5)
        assert total / count == pytest.approx(np.log(32), abs=0.3)


@pytest.mark.slow
def test_tables_that_differ_between_layers_of_a_pattern(pattern):
    """Each MoE layer's table, weights and merged gradients must meet, wherever stacking put the
    layer.
    """
    program = make_program(1, 2, moe=PATTERN_MOE, model=PATTERN, redundant=1)
    table = Placement(
        np.array([[1, 0, 3, 2, 3, -1], [3, 2, 0, 1, 0, -1], [2, 3, 1, 1, 0, 2]]), 4, 2
    )
    _, figures = run(program, moved(program, program.init(7), table))
    assert_same(figures, pattern[1])


def test_each_layer_has_its_own_bias(pattern_program):
    """Layer by layer the bias sends everything to another expert: loads are reported for the layer
    that had them.
    """
    state = pattern_program.init(7)
    bias = np.full((3, 4), -9.0, np.float32)
    bias[0, 2] = bias[1, 0] = bias[2, 3] = 9.0
    state = state._replace(
        tables=state.tables._replace(bias_E=jax.device_put(bias, state.tables.bias_E.sharding))
    )
    _, (measured,) = run(pattern_program, state, steps=1)
    load = measured.layers.router.load_E
    assert load.argmax(axis=1).tolist() == [2, 0, 3]
    np.testing.assert_array_equal(load.max(axis=1), measured.layers.router.tokens)


def test_initial_experts_follow_a_table_whose_layers_differ():
    """A table of a planner: each slot starts with its expert, replicas alike, as in the contiguous
    table.
    """
    table = Placement(np.array([[1, 0, 3, 2, 3, -1], [3, 2, 0, 1, 0, -1]]), 4, 2)
    settings = dict(num_experts=4)
    plain = (
        make_program(1, 1, moe=settings).init(0).params["stacks"][0]["blocks"][0]["mlp"]["experts"]
    )
    placed = (
        make_program(1, 2, moe=settings, placement=table)
        .init(0)
        .params["stacks"][0]["blocks"][0]["mlp"]["experts"]
    )
    for name in plain:
        for layer, row in enumerate(table.physical_to_logical):
            want = np.concatenate([plain[name][layer], np.zeros_like(plain[name][layer][:1])])[row]
            np.testing.assert_array_equal(placed[name][layer], want)


@pytest.mark.slow
def test_a_capacity_counts_what_it_drops():
    """Invariant 4 with a capacity, over a batch in parts."""
    program = make_program(
        2, 2, moe=MOE | dict(dropless=False, capacity_factor=0.6), accumulation=2
    )
    _, figures = run(program, steps=1)
    layers = figures[0].layers
    np.testing.assert_array_equal(layers.kept + layers.dropped, TOP_K * layers.router.tokens)
    assert np.all(layers.dropped > 0) and np.all(layers.kept > 0)
    np.testing.assert_array_equal(layers.rounds, 1)
    # The load is what was asked for, not what was granted.
    np.testing.assert_array_equal(layers.router.load_E.sum(axis=1), TOP_K * layers.router.tokens)


def test_replicated_values_are_checked_everywhere_outside_ops():
    """Invariant 7: no shard_map switches off the check of what varies over the mesh."""
    package = Path(moe_jax.__file__).parent
    found = 0
    for path in package.rglob("*.py"):
        if "ops" in path.relative_to(package).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            names = {part.attr for part in ast.walk(node.func) if isinstance(part, ast.Attribute)}
            names |= {part.id for part in ast.walk(node.func) if isinstance(part, ast.Name)}
            # partial(jax.shard_map, ...) carries the keywords too
            names |= {arg.attr for arg in node.args if isinstance(arg, ast.Attribute)}
            if "shard_map" not in names:
                continue
            found += 1
            for keyword in node.keywords:
                assert keyword.arg is not None, (
                    f"{path}:{node.lineno}: keywords of shard_map are hidden in a dictionary"
                )
                # On a mesh of one device nothing can differ, and tracking it would leave sums in
                # the program.
                checked = ast.unparse(keyword.value) in (
                    "True",
                    "self.mesh.size > 1",
                    "mesh.size > 1",
                )
                assert keyword.arg not in ("check_vma", "check_rep") or checked, (
                    f"{path}:{node.lineno} switches the check off"
                )
    assert found >= 3


def test_strict_promotion_and_half_precision_throughout_the_model(strict_promotion):
    """The forward and backward pass in bf16, traced where mixed dtypes raise; gradients are f32
    like the masters.
    """
    program = make_program(
        2,
        2,
        2,
        moe=MOE | dict(score="sigmoid", num_groups=2),
        model=dict(compute_dtype="bfloat16"),
        accumulation=2,
    )
    batch = program.shard(make_batch(0))
    shapes = program.abstract_state
    grads, losses = jax.eval_shape(
        program.gradients, shapes.params, batch, shapes.tables, jax.random.key(0)
    )
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    assert losses.ce_loss.dtype == jnp.float32


def test_the_default_table_is_what_a_program_starts_from():
    program = make_program(1, 4)
    np.testing.assert_array_equal(
        program.init(0).expert_LP, contiguous(2, EXPERTS, 4).physical_to_logical
    )
