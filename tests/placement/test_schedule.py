"""Schedules of migrations, carried out in NumPy: what arrives where, and in how few turns."""

from __future__ import annotations

import numpy as np
import pytest

from moe_jax.placement.schedule import NOTHING, Call, moves_between, plan_migration
from moe_jax.placement.table import EMPTY, Placement


def table(*rows: list[int], experts: int, ranks: int) -> Placement:
    return Placement(np.array(rows, np.int32), experts, ranks)


def carry_out(call: Call, weights_LRN: np.ndarray) -> np.ndarray:
    """What every slot holds after a call, by the field comments of `Call`."""
    after = weights_LRN.copy()
    ranks = weights_LRN.shape[1]
    for turn in range(int(call.turns)):
        for rank in range(ranks):
            receiver = (rank + call.shift_I[turn]) % ranks
            layer, slot = call.layer_RI[receiver, turn], call.slot_RI[receiver, turn]
            if layer != NOTHING:
                place = call.row_RI[rank, turn]
                sent = call.send_layer_RG[rank, place], rank, call.send_slot_RG[rank, place]
                assert NOTHING not in sent
                after[layer, receiver, slot] = weights_LRN[sent]
    return after


def random_table(draw: np.random.Generator, layers: int, experts: int, ranks: int, slots: int):
    """Every expert once, and in the other slots replicas or nothing."""

    def row() -> np.ndarray:
        while True:
            more = draw.integers(EMPTY, experts, slots - experts)
            row_RN = draw.permutation([*range(experts), *more]).reshape(ranks, -1)
            if all(len(set(has)) == has.size for has in (own[own >= 0] for own in row_RN)):
                return row_RN.reshape(-1)

    return Placement(np.stack([row() for _ in range(layers)]), experts, ranks)


@pytest.mark.parametrize("seed", range(20))
def test_a_schedule_brings_every_expert_to_its_slot(seed: int) -> None:
    draw = np.random.default_rng(seed)
    layers, ranks, share = (int(draw.integers(1, 5)) for _ in range(3))
    slots = ranks * share
    experts = slots - int(draw.integers(0, ranks))
    old, new = (random_table(draw, layers, experts, ranks, slots) for _ in range(2))
    budget = share * int(draw.integers(1, 3))
    held, turns = old.physical_to_logical.reshape(layers, ranks, share), 0
    calls = plan_migration(old, new, budget).calls
    for call in calls:
        assert call.send_layer_RG.shape == call.send_slot_RG.shape == (ranks, budget)
        assert call.row_RI.shape == call.layer_RI.shape == (ranks, ranks * budget)
        assert 0 < call.turns <= ranks * budget
        held, turns = carry_out(call, held), turns + int(call.turns)
        # What is received is what the table wants, each expert once.
        received = call.layer_RI[:, : int(call.turns)] != NOTHING
        assert (call.layer_RI[:, int(call.turns) :] == NOTHING).all()
        assert not call.shift_I[int(call.turns) :].any()
        assert received.any(0).all()  # no turn in which nothing arrives
    wanted = new.physical_to_logical
    np.testing.assert_array_equal(
        np.where(wanted == EMPTY, EMPTY, held.reshape(layers, -1)), wanted
    )
    received = sum(int((call.layer_RI != NOTHING).sum()) for call in calls)
    assert received == len(moves_between(old, new))
    assert all(following.turns > 0 for following in calls) and turns <= max(1, received)


def test_one_call_by_hand() -> None:
    """Two ranks of two slots: expert 0 is copied aside once for two receivers, one of them at
    home.
    """
    old = table([0, 1, 2, 3], [3, 2, 1, 0], experts=4, ranks=2)
    new = table([1, 0, 2, 3], [3, 2, 1, 0], experts=4, ranks=2)
    assert moves_between(old, new).tolist() == [[0, 1, 0], [0, 0, 1]]
    (call,) = plan_migration(old, new, 2).calls
    assert call.send_layer_RG.tolist() == [[0, 0], [NOTHING, NOTHING]]
    assert call.send_slot_RG.tolist() == [[1, 0], [NOTHING, NOTHING]]
    assert int(call.turns) == 2 and call.shift_I.tolist() == [0, 0, 0, 0]
    assert call.row_RI[0, :2].tolist() == [0, 1] and call.row_RI.dtype == np.int32
    assert call.layer_RI.tolist() == [[0, 0, NOTHING, NOTHING], [NOTHING] * 4]
    assert call.slot_RI.tolist() == [[0, 1, NOTHING, NOTHING], [NOTHING] * 4]


def test_turns_are_those_of_the_busiest_sender_per_shift() -> None:
    """Rank 0 sends two experts one rank further while rank 1 sends one: two turns, not three."""
    old = table([0, 1, 2, 3, 4, 5], experts=6, ranks=3)
    new = table([4, 5, 0, 1, 2, 3], experts=6, ranks=3)
    (call,) = plan_migration(old, new, 2).calls
    assert int(call.turns) == 2 and call.shift_I[:2].tolist() == [1, 1]
    mixed = table([2, 1, 0, 4, 3, 5], experts=6, ranks=3)
    (call,) = plan_migration(old, mixed, 2).calls
    # Shift 1: 0 > 1 and 1 > 2; shift 2: 1 > 0 and 2 > 1.
    assert call.shift_I[: int(call.turns)].tolist() == [1, 2]


def test_an_expert_that_goes_to_two_slots_is_copied_aside_once() -> None:
    old = table([0, 1, 2, EMPTY, 3, EMPTY], experts=4, ranks=3)
    new = table([0, 1, 2, 0, 3, 0], experts=4, ranks=3)
    (call,) = plan_migration(old, new, 2).calls
    assert call.send_slot_RG.tolist() == [[0, NOTHING], [NOTHING] * 2, [NOTHING] * 2]
    assert call.shift_I[: int(call.turns)].tolist() == [1, 2]


def test_layers_share_a_call_until_the_budget_is_used() -> None:
    old = table(*[[0, 1, 2, 3]] * 5, experts=4, ranks=2)
    new = table(*[[2, 3, 0, 1]] * 5, experts=4, ranks=2)
    assert [int(call.turns) for call in plan_migration(old, new, 2).calls] == [2] * 5
    assert [int(call.turns) for call in plan_migration(old, new, 4).calls] == [4, 4, 2]
    assert [int(call.turns) for call in plan_migration(old, new, 5).calls] == [4, 4, 2]
    assert [int(call.turns) for call in plan_migration(old, new, 10).calls] == [10]
    # Of layers that do not change nothing is sent.
    assert plan_migration(old, old, 2).calls == []
    last = table(*[[0, 1, 2, 3]] * 4, [0, 3, 2, 1], experts=4, ranks=2)
    (call,) = plan_migration(old, last, 2).calls
    assert set(call.layer_RI[call.layer_RI != NOTHING].tolist()) == {4} and int(call.turns) == 1


def test_a_budget_that_cannot_hold_a_layer_is_refused() -> None:
    old = table([0, 1, 2, 3], experts=4, ranks=2)
    with pytest.raises(AssertionError):
        plan_migration(old, old, 1)
    with pytest.raises(AssertionError):
        plan_migration(old, table([0, 1, 2, 3], experts=4, ranks=4), 2)
