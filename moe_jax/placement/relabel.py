"""Moving as few experts as possible: which device gets which part of a new table, and which slot
gets which expert.

The devices of a host are alike, so their parts of a table may change places. Most experts stay
where they are if parts are matched with devices by maximum overlap (the assignment problem, which
SciPy solves exactly). A bound on the rows over the link of a device keeps a table that was planned
for its traffic as good as it is.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_jax.placement.table import EMPTY, Placement


def relabel(
    new: Placement,
    present: Placement,
    hosts: int = 1,
    *,
    swap_hosts: bool = False,
    rows_LHDD: np.ndarray | None = None,
) -> Placement:
    """`new` with its parts on those devices, and its experts in those slots, that keep most of
    `present` as it is.

    Parts stay on their host; with `swap_hosts` all parts of a host may go to another host together.
    `rows_LHDD` [L, H, device, part] are the rows over the link of a device if it gets a part; if
    given, no device gets more rows than the busiest of its layer has now. A table with other
    experts, devices or layers than `present` is returned unchanged.
    """
    if (new.num_experts, new.ranks, len(new.by_rank)) != (
        present.num_experts,
        present.ranks,
        len(present.by_rank),
    ):
        return new
    table_LRS, old_LRS = new.by_rank.copy(), present.by_rank
    for layer in range(len(table_LRS)):
        held_RE, old_RE = (_held(table[layer], new.num_experts) for table in (table_LRS, old_LRS))
        parts = np.arange(new.ranks).reshape(hosts, -1)
        if swap_hosts:
            held_HE, old_HE = (held.reshape(*parts.shape, -1).sum(1) for held in (held_RE, old_RE))
            parts = parts[_match(np.minimum(held_HE, old_HE[:, None]).sum(-1))]
        for host, own_D in enumerate(parts.copy()):
            devices = np.arange(new.ranks).reshape(hosts, -1)[host]
            overlap_DD = old_RE[devices] @ held_RE[own_D].T
            if rows_LHDD is not None:
                busiest = np.diagonal(rows_LHDD[layer], axis1=1, axis2=2).max()
                overlap_DD = np.where(rows_LHDD[layer, host] <= busiest, overlap_DD, -new.num_slots)
            parts[host] = own_D[_match(overlap_DD)]
        table_LRS[layer] = table_LRS[layer, parts.reshape(-1)]
    return Placement(
        _keep_slots(table_LRS, old_LRS).reshape(new.physical_to_logical.shape),
        new.num_experts,
        new.ranks,
    )


def moves(new: Placement, present: Placement) -> np.ndarray:
    """How many experts must be sent to each device, int64 [L, R]: those it does not hold at
    present. For tables of equally many devices.
    """
    held_LRE = np.array(
        [
            [_held(table, new.num_experts) for table in placement.by_rank]
            for placement in (new, present)
        ],
        bool,
    )
    if not held_LRE.size:
        return np.zeros(new.by_rank.shape[:2], np.int64)
    return np.sum(held_LRE[0] & ~held_LRE[1], axis=-1)


def _held(table_RS: np.ndarray, num_experts: int) -> np.ndarray:
    """Which devices hold which experts, float32 [R, E]."""
    # One place more, into which EMPTY falls.
    held_RE = np.zeros((len(table_RS), num_experts + 1), np.float32)
    held_RE[np.arange(len(table_RS))[:, None], table_RS] = 1
    return held_RE[:, :-1]


def _match(overlap: np.ndarray) -> np.ndarray:
    """For each row its column, so that the sum is largest; among equal sums the diagonal, so that
    nothing moves without need.
    """
    return linear_sum_assignment(
        overlap + 1e-3 * np.eye(len(overlap)) / len(overlap), maximize=True
    )[1]


def _keep_slots(table_LRS: np.ndarray, old_LRS: np.ndarray) -> np.ndarray:
    """The same parts with each expert in the slot that it has in `old_LRS`, if it is there,
    [L, R, S].
    """
    slots = table_LRS.shape[-1]
    # [L, R, S new, S old]
    stays = (table_LRS[..., None] == old_LRS[..., None, :slots]) & (table_LRS[..., None] != EMPTY)
    kept = np.any(stays, axis=-1)
    target = np.argmax(stays, axis=-1)
    taken = np.any(stays, axis=-2)
    taken = np.concatenate(
        [taken, np.zeros((*taken.shape[:-1], slots - taken.shape[-1]), bool)], axis=-1
    )
    # First those that stay, in the order of their slots, which are the taken ones; then the others,
    # into the remaining slots.
    order = np.argsort(np.where(kept, target, slots), axis=-1, kind="stable")
    places = np.argsort(~taken, axis=-1, kind="stable")
    placed = np.empty_like(table_LRS)
    np.put_along_axis(placed, places, np.take_along_axis(table_LRS, order, axis=-1), axis=-1)
    return placed
