"""Moving experts during training changes where things are and nothing else."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.models.layer_pattern import expert_layers
from moe_jax.models.paths import path_of
from moe_jax.placement.schedule import moves_between
from moe_jax.placement.table import EMPTY, Placement
from moe_jax.profiling import hlo
from moe_jax.training.placement.migration import Migration
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram
from tests.support.tiny_programs import EXPERTS, make_batch, make_program

MOE = dict(aux_loss=0.1, bias_rate=0.05, input_noise=0.1, shared_experts=1, dispatch="pooled")
# Layers dense, then MoE and dense in turn, then MoE: two stacks, of which the first holds a pattern
# of two.
PATTERN = dict(
    model=dict(num_layers=5, sliding_window=4, window_every=2),
    moe=MOE | dict(first_dense=1, dense_layers=(2,)),
)


def shuffled(draw: np.random.Generator, old: Placement, replicas: bool = False) -> Placement:
    """A table of the same shape with its experts anywhere; with `replicas` other experts have
    some.
    """
    layers, experts, share = (
        old.physical_to_logical.shape[0],
        old.num_experts,
        old.num_slots // old.ranks,
    )
    table = np.full((layers, old.ranks, share), EMPTY, np.int32)
    for slots in table:
        for number, expert in enumerate(draw.permutation(experts)):
            slots[number % old.ranks, number // old.ranks] = expert
        if replicas:
            for device in slots:
                free = np.flatnonzero(device == EMPTY)
                device[free] = draw.choice(
                    np.setdiff1d(np.arange(experts), device), free.size, replace=False
                )
        for device in slots:
            device[:] = device[draw.permutation(share)]
    return Placement(table.reshape(layers, -1), experts, old.ranks)


def drawn(program: TrainProgram, seed: int = 0) -> TrainState:
    """A state whose floats all differ, replicas of an expert alike."""
    draw = np.random.default_rng(seed)
    state = jax.tree.map(np.asarray, program.init(7))

    def one(keys, leaf):
        if leaf.dtype != np.float32:
            return leaf
        values = draw.standard_normal(leaf.shape, np.float32)
        path = path_of(keys)
        if path.is_expert and leaf.ndim > 1:
            rows = expert_layers(program.model, program.moe)[path.layer_block]
            first = program.placement.first_slot()[rows]
            table = program.placement.physical_to_logical[rows]
            values = np.stack(
                [
                    v[np.where(t == EMPTY, 0, f[t])]
                    for v, t, f in zip(values, table, first, strict=True)
                ]
            )
        return values

    return jax.device_put(jax.tree.map_with_path(one, state), program.state_shardings)


def by_expert(
    program: TrainProgram, state: TrainState, placement: Placement
) -> dict[str, np.ndarray]:
    """Arrays by path, experts in logical order, from each of whose replicas the same; tables left
    out.
    """
    found = {}
    for keys, leaf in jax.tree.leaves_with_path(
        state._replace(tables=state.tables.bias_E, expert_LP=None)
    ):
        path, array = path_of(keys), np.asarray(leaf)
        name = path.text
        if path.is_expert and array.ndim > 1:
            rows = expert_layers(program.model, program.moe)[path.layer_block]
            for repeat, row in enumerate(rows):
                for expert in range(placement.num_experts):
                    held = array[repeat][placement.slots_of(row, expert)]
                    np.testing.assert_array_equal(
                        held, np.broadcast_to(held[:1], held.shape), err_msg=f"replicas in {name}"
                    )
                    found[f"{name} {row} {expert}"] = held[0]
        else:
            found[name] = array
    return found


PROGRAMS = {
    "2x4": dict(data=2, expert=4, moe=MOE),
    "1x8, two arrays' patterns": dict(expert=8, **PATTERN),
    "2x2x2 with biases": dict(data=2, expert=2, tensor=2, moe=MOE | dict(expert_bias=True)),
    "2x4, replicas": dict(data=2, expert=4, redundant=2, moe=MOE),
    "1x4, replicas on two hosts": dict(expert=4, redundant=1, moe=MOE, hosts=2),
    "adafactor": dict(
        expert=4,
        model=dict(width=128),
        moe=MOE | dict(hidden=128),
        optimizer=dict(name="adafactor"),
        redundant=1,
    ),
    "muon": dict(data=2, expert=2, moe=MOE, optimizer=dict(name="muon")),
    "one device": dict(moe=MOE),
}
QUICK = ("2x2x2 with biases", "1x4, replicas on two hosts", "muon", "one device")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, settings in PROGRAMS.items()
    ],
)
def test_everything_of_an_expert_moves_and_nothing_else(settings):
    program = make_program(**settings)
    migration, draw = Migration(program), np.random.default_rng(5)
    state, old = drawn(program), program.placement
    before = by_expert(program, state, old)
    for replicas in (False, True, True, False) if settings.get("redundant") else (False, False):
        new = shuffled(draw, old, replicas)
        state, moved = migration(state, migration.plan(old, new))
        after = by_expert(program, state, new)
        assert before.keys() == after.keys()
        for name, values in before.items():
            np.testing.assert_array_equal(after[name], values, err_msg=name)
        np.testing.assert_array_equal(state.expert_LP, new.physical_to_logical)
        for have, want in zip(state.tables[:3], new.routing(program.hosts), strict=True):
            np.testing.assert_array_equal(have, want)
        for leaf, sharding in zip(
            jax.tree.leaves(state), jax.tree.leaves(program.state_shardings), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert moved.experts == len(moves_between(old, new)) > 0
        old = new
    assert migration.run._cache_size() == 1


@pytest.mark.slow
def test_a_loss_curve_with_a_migration_every_five_steps_is_the_same_to_the_last_bit():
    """Without drops and with one round, which depend on where experts are, all is in one order of
    arithmetic.
    """
    program = make_program(2, 4, moe=MOE | dict(capacity_factor=4.0))
    migration, draw = Migration(program), np.random.default_rng(1)

    def curve(moves: bool) -> tuple[list[float], TrainState, Placement]:
        state, placement, losses = program.init(7), program.placement, []
        for step in range(50):
            if moves and step and step % 5 == 0:
                new = shuffled(draw, placement)
                state, _ = migration(state, migration.plan(placement, new))
                placement = new
            state, figures = program.train_step(state, program.shard(make_batch(step)))
            losses += [float(figures.loss), float(figures.grad_norm)]
        return losses, state, placement

    (still, state, old), (moving, other, new) = curve(False), curve(True)
    assert moving == still
    before, after = by_expert(program, state, old), by_expert(program, other, new)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)
    assert program.train_step._cache_size() == migration.run._cache_size() == 1


@pytest.mark.slow
def test_replicas_come_and_go_and_lose_nothing():
    """From no replica to some to others to none; the losses are those without, and replicas stay
    equal bit for bit.
    """
    plain, program = make_program(1, 4, moe=MOE), make_program(1, 4, moe=MOE, redundant=1)
    migration, draw = Migration(program), np.random.default_rng(2)
    state, reference, placement = program.init(7), plain.init(7), program.placement
    for step in range(12):
        if step % 3 == 0:
            new = shuffled(draw, placement, replicas=step in (3, 6))
            state, _ = migration(state, migration.plan(placement, new))
            placement = new
        state, figures = program.train_step(state, program.shard(make_batch(step)))
        reference, wanted = plain.train_step(reference, plain.shard(make_batch(step)))
        np.testing.assert_allclose(figures.loss, wanted.loss, rtol=1e-6)
        by_expert(program, state, placement)  # asserts that replicas are equal, moments included


@pytest.mark.parametrize(
    "settings", [dict(moe=MOE, redundant=1), PATTERN], ids=["one block", "two blocks"]
)
def test_the_compiled_program_sends_single_experts_and_gathers_nothing(settings):
    program = make_program(2, 4, **settings)
    migration = Migration(program)
    state = program.init(7)
    banks = {path: leaf for path, leaf in _flat(state).items() if path in migration.paths}
    new = shuffled(np.random.default_rng(0), program.placement)
    call = migration.plan(program.placement, new).calls[0]
    text = migration.run.lower(banks, call).compile().as_text()
    (sent,) = hlo.collectives(text)
    # One for each distance that an expert can travel; each carries a device's part (data=2) of one
    # expert with two moments.
    assert (sent.op, sent.times) == ("collective-permute", 3)
    assert sent.bytes == 3 * migration.costs.expert_bytes // 2
    bank = sum(leaf.nbytes for leaf in banks.values())
    layers, slots = program.placement.physical_to_logical.shape
    assert migration.costs.expert_bytes == bank // (layers * slots)


def test_a_single_swap_costs_two_experts():
    program = make_program(1, 4, moe=MOE)
    migration, old = Migration(program), program.placement
    table = np.array(old.physical_to_logical)
    table[1, [0, 5]] = table[1, [5, 0]]
    new = Placement(table, EXPERTS, 4)
    state, moved = migration(program.init(7), migration.plan(old, new))
    assert moved[:4] == (2, 2 * migration.costs.expert_bytes, 1, 1)  # both go two ranks on
    assert migration(state, migration.plan(new, new))[1][:4] == (0, 0, 0, 0)


def test_moments_that_mix_experts_are_refused():
    settings = dict(
        model=dict(width=128), moe=MOE | dict(num_experts=128), optimizer=dict(name="adafactor")
    )
    with pytest.raises(UserError, match="moments of a layer's 128 slots"):
        make_program(1, 2, **settings)


def _flat(state: TrainState) -> dict[str, jax.Array]:
    return {path_of(keys).text: leaf for keys, leaf in jax.tree.leaves_with_path(state)}
