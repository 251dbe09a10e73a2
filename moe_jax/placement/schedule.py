"""The schedule of a migration: which expert goes from which device to which, and in what order.
Numpy only.

A migration consists of calls of one compiled program. In a call every device first copies the
experts that it must send to a buffer, up to a budget. Then in each turn it sends one of them to the
rank `shift` further and receives one from the rank `shift` before. The moves of all layers share
turns, so that most devices have something to send in most turns.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from moe_jax.placement.table import EMPTY, Placement, slot_sources

NOTHING = -1


class Call(NamedTuple):
    """One call of the program: what each rank copies to its buffer (G places), and then its part in
    each of the turns (I places). All int32.
    """

    # Layer and local slot of each expert to copy; NOTHING if there are fewer.
    send_layer_RG: np.ndarray
    send_slot_RG: np.ndarray
    turns: np.ndarray  # a scalar: of the I places so many are used
    shift_I: np.ndarray  # by how many ranks every expert of the turn travels; 0 stays on its device
    row_RI: np.ndarray  # which copy a rank sends; an arbitrary one if it has nothing to send
    # Where the expert that a rank receives goes; NOTHING if it is not meant for this rank.
    layer_RI: np.ndarray
    slot_RI: np.ndarray


def moves_between(old: Placement, new: Placement) -> np.ndarray:
    """For each slot of `new` that gets another expert: layer, slot of `old` it comes from, slot it
    goes to, int [M, 3].
    """
    sources_LP = slot_sources(old, new)
    layer, slot = np.nonzero((sources_LP != np.arange(new.num_slots)) & (sources_LP != EMPTY))
    return np.stack([layer, sources_LP[layer, slot], slot], axis=1)


class MigrationPlan(NamedTuple):
    """How `old` becomes `new`."""

    old: Placement
    new: Placement
    moves: np.ndarray  # `moves_between` the two
    calls: list[Call]

    @property
    def turns(self) -> int:
        """Turns of all calls."""
        return sum(int(call.turns) for call in self.calls)

    @property
    def sent(self) -> int:
        """Moves that change device."""
        share = self.old.num_slots // self.old.ranks
        return int(np.sum(self.moves[:, 1] // share != self.moves[:, 2] // share))


def plan_migration(old: Placement, new: Placement, budget: int) -> MigrationPlan:
    """Calls that turn `old` into `new`, each with at most `budget` (at least P/R) copies per device
    and R x `budget` turns.

    All moves of a layer are in one call. Its copies are made before anything is written, so the
    order of its moves does not matter.
    """
    share = old.num_slots // old.ranks
    assert (old.ranks, old.num_slots) == (new.ranks, new.num_slots) and budget >= share
    moves_M3 = moves_between(old, new)
    by_layer: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for layer, source, slot in moves_M3.tolist():
        by_layer[layer].append((layer, source, slot))
    calls: list[Call] = []
    group: list[tuple[int, int, int]] = []
    for moves in by_layer.values():
        if group and not _fits(group + moves, old.ranks, share, budget):
            calls.append(_call(group, old.ranks, share, budget))
            group = []
        group = group + moves
    if group:
        calls.append(_call(group, old.ranks, share, budget))
    return MigrationPlan(old, new, moves_M3, calls)


def idle_call(placement: Placement, budget: int) -> Call:
    """A call that moves nothing: for compiling the program."""
    return _call([], placement.ranks, placement.num_slots // placement.ranks, budget)


def _fits(moves: list[tuple[int, int, int]], ranks: int, share: int, budget: int) -> bool:
    copies = np.bincount(
        [source // share for _, source in {(layer, source) for layer, source, _ in moves}],
        minlength=ranks,
    )
    return (
        bool(np.max(copies) <= budget)
        and sum(_turns(moves, ranks, share).values()) <= ranks * budget
    )


def _turns(moves: list[tuple[int, int, int]], ranks: int, share: int) -> dict[int, int]:
    """The number of turns for each shift, ascending: as many as its busiest sender has moves."""
    queues = Counter(
        ((slot // share - source // share) % ranks, source // share) for _, source, slot in moves
    )
    return {
        shift: max(queues[shift, rank] for rank in range(ranks))
        for shift in sorted({shift for shift, _ in queues})
    }


def _call(moves: list[tuple[int, int, int]], ranks: int, share: int, budget: int) -> Call:

    def empty(size):
        return np.full((ranks, size), NOTHING, np.int32)

    send_layer, send_slot = empty(budget), empty(budget)
    row, layer_of, slot_of = (
        np.zeros((ranks, ranks * budget), np.int32),
        empty(ranks * budget),
        empty(ranks * budget),
    )
    turns = _turns(moves, ranks, share)
    start = dict(zip(turns, np.cumsum([0, *turns.values()]).tolist(), strict=False))
    copies: dict[tuple[int, int], int] = {}
    used, next_turn = Counter[int](), Counter[tuple[int, int]]()
    for layer, source, slot in moves:
        rank, receiver = source // share, slot // share
        if (layer, source) not in copies:
            copies[layer, source] = used[rank]
            send_layer[rank, used[rank]], send_slot[rank, used[rank]] = layer, source % share
            used[rank] += 1
        shift = (receiver - rank) % ranks
        turn = start[shift] + next_turn[shift, rank]
        next_turn[shift, rank] += 1
        row[rank, turn], layer_of[receiver, turn], slot_of[receiver, turn] = (
            copies[layer, source],
            layer,
            slot % share,
        )
    shifts = np.repeat(np.array(list(turns), np.int32), np.array(list(turns.values()), np.int32))
    padded = np.zeros(ranks * budget, np.int32)
    padded[: shifts.size] = shifts
    return Call(
        send_layer, send_slot, np.array(shifts.size, np.int32), padded, row, layer_of, slot_of
    )
