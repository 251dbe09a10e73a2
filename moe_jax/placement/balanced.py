"""Equal load on every device, from the loads of the experts alone: replicate the busiest experts,
deal out, swap.

The three steps, and the hierarchical form (groups to hosts, then within a host), are those of
DeepSeek's expert parallelism load balancer (https://github.com/deepseek-ai/EPLB; DeepSeek-V3
Technical Report, arXiv:2412.19437, section 3.4.1); dealing out is longest-processing-time-first
(Graham 1969) with equally many slots per device. The swaps at the end are added here; with few
slots per device they come much closer to even. N problems (layers, or layers x hosts) are solved at
once, each on B bins (devices, or hosts) of S slots.
"""

from __future__ import annotations

import numpy as np

from moe_jax.placement.table import EMPTY

# A smaller gain, as a fraction of the busiest bin's load or of a layer's cost, is only rounding.
LEAST_GAIN = 1e-9
RESTARTS = 160
DISTURBANCE = 1.5  # sigma of the lognormal factors on the loads of a restart
# The present table is changed, and no new one used, if it reaches this times the new table's load.
STAY = 1.005
GOOD_ENOUGH = 1.02  # times the lower bound: a problem that reaches it does not start again


def balanced(
    load_LE: np.ndarray,
    ranks: int,
    slots: int,
    hosts: int,
    groups: int,
    present_LRS: np.ndarray | None = None,
) -> np.ndarray:
    """The experts in the slots of each device, int32 [L, R, S]: hierarchical if the groups can be
    divided equally among the hosts, otherwise global.

    The global form changes the present table of a layer, which has no EMPTY, if that comes as far
    (within STAY) as a new table.
    """
    if hosts > 1 and groups % hosts == 0 and load_LE.shape[1] % groups == 0:
        return _hierarchical(load_LE, ranks, slots, hosts, groups)
    # Replicas are dealt out one after another: with this order of devices they come to different
    # hosts.
    spread_R = np.arange(ranks).reshape(hosts, -1).T.reshape(-1)
    table_LRS = np.empty((len(load_LE), ranks, slots), np.int32)
    table_LRS[:, spread_R], busiest_L = pack_bins(load_LE, ranks, slots)
    if present_LRS is None:
        return table_LRS
    counts_LE = np.array(
        [np.bincount(table.reshape(-1), minlength=load_LE.shape[1]) for table in present_LRS]
    )
    changed_LRS, reached_L = refine(present_LRS, load_LE, counts_LE.reshape(load_LE.shape))
    return np.where((reached_L <= busiest_L * STAY)[:, None, None], changed_LRS, table_LRS)


def _hierarchical(
    load_LE: np.ndarray, ranks: int, slots: int, hosts: int, groups: int
) -> np.ndarray:
    """Groups go to hosts by their load; then the experts of each host are replicated and dealt out
    among its own devices.
    """
    layers, num_experts = load_LE.shape
    size = num_experts // groups
    group_LHG, _ = pack_bins(load_LE.reshape(layers, groups, size).sum(-1), hosts, groups // hosts)
    expert_LHE = (group_LHG[..., None] * size + np.arange(size)).reshape(layers * hosts, -1)
    load_NE = np.take_along_axis(np.repeat(load_LE, hosts, axis=0), expert_LHE, axis=1)
    local_NBS, _ = pack_bins(load_NE, ranks // hosts, slots)
    named = np.take_along_axis(
        expert_LHE, np.maximum(local_NBS, 0).reshape(len(local_NBS), -1), axis=1
    ).reshape(local_NBS.shape)
    return np.where(local_NBS == EMPTY, EMPTY, named).reshape(layers, ranks, slots).astype(np.int32)


def pack_bins(load_NE: np.ndarray, bins: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """All slots filled, int32 [N, B, S], with each expert at least once and never twice in a bin,
    and the load of the busiest bin [N].

    Problems that are still far from the lower bound start again from disturbed loads, which give
    other numbers of replicas.
    """
    counts_NE = replicate(load_NE, bins, slots)
    bound_N = np.maximum(load_NE.sum(1) / bins, (load_NE / counts_NE).max(1, initial=0))
    if load_NE.shape[1] == bins * slots:
        # Without replicas the busiest expert shares its bin with the least busy ones, at best.
        rising_NE = np.sort(load_NE, axis=1)
        bound_N = np.maximum(bound_N, rising_NE[:, -1] + rising_NE[:, : slots - 1].sum(1))
    table_NBS, busiest_N = refine(
        deal(load_NE / counts_NE, counts_NE, bins, slots), load_NE, counts_NE
    )
    draw = np.random.default_rng(0)
    for _ in range(RESTARTS):
        far_N = np.flatnonzero(busiest_N > bound_N * GOOD_ENOUGH)
        if not far_N.size:
            break
        load = load_NE[far_N]
        disturbed = load * draw.lognormal(0.0, DISTURBANCE, load.shape)
        counts = replicate(disturbed, bins, slots)
        table, busiest = refine(deal(disturbed / counts, counts, bins, slots), load, counts)
        better = busiest < busiest_N[far_N]
        table_NBS[far_N[better]], busiest_N[far_N[better]] = table[better], busiest[better]
    return table_NBS, busiest_N


def replicate(load_NE: np.ndarray, bins: int, slots: int) -> np.ndarray:
    """Replicas of each expert, int64 [N, E]: spare slots go one by one to the expert with the
    highest load per replica.

    This makes the highest load per replica as low as possible. EMPTY slots are left only if every
    bin has every expert.
    """
    problems, num_experts = load_NE.shape
    counts_NE = np.ones((problems, num_experts), np.int64)
    # If nothing has load, the expert with the fewest replicas comes first.
    weight_NE = load_NE + np.where(
        load_NE.any(1, keepdims=True), load_NE.mean(1, keepdims=True) * LEAST_GAIN, 1.0
    )
    for _ in range(min(bins * slots, num_experts * bins) - num_experts):
        busiest_N = np.argmax(np.where(counts_NE < bins, weight_NE / counts_NE, -1.0), axis=1)
        counts_NE[np.arange(problems), busiest_N] += 1
    return counts_NE


def deal(weight_NE: np.ndarray, counts_NE: np.ndarray, bins: int, slots: int) -> np.ndarray:
    """Replicas of weight `weight_NE`, heaviest first, to the least loaded bins, one per bin and
    round, int32 [N, B, S].
    """
    problems = len(weight_NE)
    table_NBS = np.full((problems, bins, slots), EMPTY, np.int32)
    items_NP = heaviest_first(weight_NE, counts_NE, bins * slots)
    weight_NP = np.where(
        items_NP == EMPTY, 0.0, np.take_along_axis(weight_NE, np.maximum(items_NP, 0), axis=1)
    )
    load_NB = np.zeros((problems, bins))
    for round_ in range(slots):
        part = slice(round_ * bins, (round_ + 1) * bins)
        items_NB = items_NP[:, part]
        # Replicas left over from the previous round go to the least loaded of the bins that do not
        # have their expert yet.
        first_N1 = items_NB[:, :1]
        left_N1 = np.sum((items_NB == first_N1) & (first_N1 != EMPTY), axis=1, keepdims=True)
        held_NB = np.any(table_NBS[:, :, :round_] == first_N1[..., None], axis=-1)
        place_NB = np.argsort(np.lexsort((load_NB, held_NB)), axis=1)
        order_NB = np.lexsort((load_NB, place_NB >= left_N1))
        np.put_along_axis(table_NBS[:, :, round_], order_NB, items_NB.astype(np.int32), axis=1)
        load_NB += np.take_along_axis(weight_NP[:, part], np.argsort(order_NB, axis=1), axis=1)
    return table_NBS


def heaviest_first(weight_NE: np.ndarray, counts_NE: np.ndarray, slots: int) -> np.ndarray:
    """The experts by falling weight, each as often as it has replicas, int64 [N, slots]; EMPTY
    after the last.
    """
    items_NP = np.full((len(weight_NE), slots), EMPTY, np.int64)
    for items_P, weight_E, counts_E in zip(items_NP, weight_NE, counts_NE, strict=True):
        order_E = np.argsort(-weight_E, kind="stable")
        items_P[: counts_E.sum()] = np.repeat(order_E, counts_E[order_E])
    return items_NP


def refine(
    table_NBS: np.ndarray, load_NE: np.ndarray, counts_NE: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Swaps experts, or gives replicas to other experts, until nothing lowers the load of the
    busiest bin; returns the table and that load [N].
    """
    table_NBS, counts_NE = table_NBS.copy(), counts_NE.copy()
    active_N = np.arange(len(table_NBS))
    while active_N.size and table_NBS.shape[1] > 1:
        active_N = active_N[_improve(table_NBS, load_NE, counts_NE, active_N)]
    return table_NBS, slot_weights(table_NBS, load_NE / counts_NE).sum(-1).max(-1)


def slot_weights(table_NBS: np.ndarray, weight_NE: np.ndarray) -> np.ndarray:
    """The weight of each slot's expert, [N, B, S]; 0 for EMPTY."""
    weight_NBS = weight_NE[np.arange(len(table_NBS))[:, None, None], np.maximum(table_NBS, 0)]
    return np.where(table_NBS == EMPTY, 0.0, weight_NBS)


def _improve(
    table_NBS: np.ndarray, load_NE: np.ndarray, counts_NE: np.ndarray, active_N: np.ndarray
) -> np.ndarray:
    """Makes the best single change in each active problem, in place, if it helps; returns where it
    does, bool [active].
    """
    table, load, counts = table_NBS[active_N], load_NE[active_N], counts_NE[active_N]
    row = np.arange(len(table))
    slots = table.shape[2]
    weight = slot_weights(table, load / counts)
    busy = weight.sum(-1)
    top = np.argmax(busy, axis=1)
    swap, replace = (
        _swap_values(table, weight, busy, top),
        _replace_values(table, weight, busy, top, load, counts),
    )
    values = np.stack([swap, replace], axis=1).reshape(len(table), -1)
    best = np.argmin(values, axis=1)
    improved = values[row, best] < busy[row, top] * (1 - LEAST_GAIN)
    is_replace, mine, bin_, theirs = np.unravel_index(best, (2, slots, table.shape[1], slots))
    for at in np.flatnonzero(improved):
        problem = active_N[at]
        here, there = table_NBS[problem, top[at]], table_NBS[problem, bin_[at]]
        if is_replace[at]:
            counts_NE[problem, there[theirs[at]]] -= 1
            counts_NE[problem, here[mine[at]]] += 1
            there[theirs[at]] = here[mine[at]]
        else:
            here[mine[at]], there[theirs[at]] = there[theirs[at]], here[mine[at]]
    return improved


def _swap_values(
    table: np.ndarray, weight: np.ndarray, busy: np.ndarray, top: np.ndarray
) -> np.ndarray:
    """Load of the busier bin after slot i of the busiest bin and slot j of bin b change places,
    [N, i, b, j]; inf where they may not.
    """
    row = np.arange(len(table))
    experts_NS, weight_NS = table[row, top], weight[row, top]
    change = weight[:, None] - weight_NS[:, :, None, None]
    after = np.maximum(
        busy[row, top][:, None, None, None] + change, busy[:, None, :, None] - change
    )
    mine_there = _holds(table, experts_NS)  # [N, i, b]
    theirs_here = np.any(
        (table[..., None] == experts_NS[:, None, None]) & (table[..., None] != EMPTY), axis=-1
    )  # [N, b, j]
    return np.where(mine_there[..., None] | theirs_here[:, None], np.inf, after)


def _replace_values(
    table: np.ndarray,
    weight: np.ndarray,
    busy: np.ndarray,
    top: np.ndarray,
    load: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:
    """Upper bound on the load of the changed bins after slot j of bin b becomes a replica of the
    expert in slot i of the busiest bin.

    [N, i, b, j]; inf if slot j has the only replica of its expert or bin b has the new one already.
    """
    row = np.arange(len(table))
    experts_NS = table[row, top]
    known = np.maximum(table, 0)
    others = counts[row[:, None, None], known] - 1
    if not np.any(others):
        return np.full((len(table), table.shape[2], *table.shape[1:]), np.inf)
    # The added load of each remaining replica of the expert that goes.
    raised = load[row[:, None, None], known] / np.maximum(others, 1) - weight
    beside = _busiest_beside(table, busy, load.shape[1]) + raised
    # The load of each replica of the expert that comes.
    shared = (load / (counts + 1))[row[:, None], experts_NS]
    relieved = busy[row, top][:, None] - weight[row, top] + shared
    there = (busy[..., None] - weight)[:, None] + shared[:, :, None, None]
    after = np.maximum(np.maximum(relieved[:, :, None, None], there), beside[:, None])
    allowed = (
        ((others > 0) & (table != EMPTY))[:, None]
        & ~_holds(table, experts_NS)[..., None]
        & (experts_NS != EMPTY)[:, :, None, None]
    )
    return np.where(allowed, after, np.inf)


def _holds(table: np.ndarray, experts_NS: np.ndarray) -> np.ndarray:
    """Whether bin b has the expert of slot i, bool [N, i, b]."""
    return np.any(
        (table[:, None] == experts_NS[:, :, None, None]) & (experts_NS != EMPTY)[:, :, None, None],
        axis=-1,
    )


def _busiest_beside(table: np.ndarray, busy: np.ndarray, num_experts: int) -> np.ndarray:
    """For each slot the load of the busiest other bin with the same expert, [N, B, S]; -inf if
    there is none.
    """
    problems, _, slots = table.shape
    row = np.arange(problems)[:, None]
    rising = np.repeat(np.argsort(busy, axis=1, kind="stable"), slots, axis=1)
    experts = np.take_along_axis(table, rising[:, ::slots, None], axis=1).reshape(problems, -1)
    # One place more, into which EMPTY falls.
    first, second = (np.full((problems, num_experts + 1), EMPTY) for _ in range(2))
    first[row, experts] = rising  # of equal indices the last one, the busiest, stays
    below = np.where(first[row, experts] == rising, num_experts, experts)
    second[row, below] = rising
    first, second = (
        np.where(bin_ == EMPTY, -np.inf, np.take_along_axis(busy, np.maximum(bin_, 0), axis=1))
        for bin_ in (first, second)
    )
    flat = table.reshape(problems, -1)
    holder = np.repeat(busy, slots, axis=1)
    # For a slot in the busiest bin itself the second counts. Of equally busy ones, either will do.
    return np.where(holder == first[row, flat], second[row, flat], first[row, flat]).reshape(
        table.shape
    )
