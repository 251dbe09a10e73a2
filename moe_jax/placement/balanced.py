"""Equal load on every device, from the experts' loads alone: replicate the busiest, deal out, swap.

The three steps, and the hierarchical form (groups to hosts, then within a host), are those of
DeepSeek's expert parallelism load balancer (https://github.com/deepseek-ai/EPLB; DeepSeek-V3
Technical Report, arXiv:2412.19437, section 3.4.1); dealing out is longest-processing-time-first
(Graham 1969) with equally many slots a device. Added here are the swaps at the end, which come much
closer to even where a device has few slots. N problems (layers, or layers x hosts) are solved at
once, each on B bins (devices, or hosts) of S slots.
"""

from __future__ import annotations

import numpy as np

from moe_jax.placement.table import EMPTY

LEAST_GAIN = (
    1e-9  # of the busiest bin's load, or of a layer's cost, below which a change is rounding
)
RESTARTS = 160
DISTURBANCE = 1.5  # sigma of the lognormal factors on a restart's loads
STAY = (
    1.005  # times the load reached by a new table, up to which the present one is changed instead
)
GOOD_ENOUGH = 1.02  # times the lower bound, at which a problem does not start again


def balanced(
    load_LE: np.ndarray,
    ranks: int,
    slots: int,
    hosts: int,
    groups: int,
    present_LRS: np.ndarray | None = None,
) -> np.ndarray:
    """The experts in each device's slots, int32 [L, R, S]: hierarchical where the hosts share out
    the groups equally, else global.

    The global form changes a layer's present table, which has no EMPTY, where that leads as far
    (within STAY) as a new one.
    """
    if hosts > 1 and groups % hosts == 0 and load_LE.shape[1] % groups == 0:
        return _hierarchical(load_LE, ranks, slots, hosts, groups)
    # Replicas are dealt out one after another: in this order of devices they come to different
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
    """Groups to hosts by their load, then each host's experts are replicated and dealt out among
    its own devices.
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
    """All slots filled, int32 [N, B, S], each expert at least once and never twice in a bin, and
    the busiest bin's load [N].

    Problems that stay far from the lower bound start again from disturbed loads, which leads to
    other numbers of replicas.
    """
    counts_NE = replicate(load_NE, bins, slots)
    bound_N = np.maximum(load_NE.sum(1) / bins, (load_NE / counts_NE).max(1, initial=0))
    if (
        load_NE.shape[1] == bins * slots
    ):  # no replicas: the busiest expert is beside the idlest at best
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
    """How often each expert is held, int64 [N, E]: spare slots go one by one to the expert with the
    highest load a replica.

    That makes the highest load a replica as low as it can be. EMPTY slots are left only where every
    bin has every expert.
    """
    problems, num_experts = load_NE.shape
    counts_NE = np.ones((problems, num_experts), np.int64)
    # Where nothing is loaded, the least replicated comes first.
    weight_NE = load_NE + np.where(
        load_NE.any(1, keepdims=True), load_NE.mean(1, keepdims=True) * LEAST_GAIN, 1.0
    )
    for _ in range(min(bins * slots, num_experts * bins) - num_experts):
        busiest_N = np.argmax(np.where(counts_NE < bins, weight_NE / counts_NE, -1.0), axis=1)
        counts_NE[np.arange(problems), busiest_N] += 1
    return counts_NE


def deal(weight_NE: np.ndarray, counts_NE: np.ndarray, bins: int, slots: int) -> np.ndarray:
    """Replicas of weight `weight_NE`, heaviest first, to the least loaded bins, one each a round,
    int32 [N, B, S].
    """
    problems = len(weight_NE)
    table_NBS = np.full((problems, bins, slots), EMPTY, np.int32)
    items_NP = heaviest_first(weight_NE, counts_NE, bins * slots)
    weight_NP = np.where(
        items_NP == EMPTY, 0.0, np.take_along_axis(weight_NE, np.maximum(items_NP, 0), axis=1)
    )
    load_NB = np.zeros((problems, bins))
    for turn in range(slots):
        part = slice(turn * bins, (turn + 1) * bins)
        items_NB = items_NP[:, part]
        # Replicas left over from the round before go to the least loaded of the bins that do not
        # have that expert yet.
        first_N1 = items_NB[:, :1]
        left_N1 = np.sum((items_NB == first_N1) & (first_N1 != EMPTY), axis=1, keepdims=True)
        held_NB = np.any(table_NBS[:, :, :turn] == first_N1[..., None], axis=-1)
        place_NB = np.argsort(np.lexsort((load_NB, held_NB)), axis=1)
        order_NB = np.lexsort((load_NB, place_NB >= left_N1))
        np.put_along_axis(table_NBS[:, :, turn], order_NB, items_NB.astype(np.int32), axis=1)
        load_NB += np.take_along_axis(weight_NP[:, part], np.argsort(order_NB, axis=1), axis=1)
    return table_NBS


def heaviest_first(weight_NE: np.ndarray, counts_NE: np.ndarray, slots: int) -> np.ndarray:
    """The experts, each as often as it is held, by falling weight, int64 [N, slots]; EMPTY after
    the last.
    """
    items_NP = np.full((len(weight_NE), slots), EMPTY, np.int64)
    for items_P, weight_E, counts_E in zip(items_NP, weight_NE, counts_NE, strict=True):
        order_E = np.argsort(-weight_E, kind="stable")
        items_P[: counts_E.sum()] = np.repeat(order_E, counts_E[order_E])
    return items_NP


def refine(
    table_NBS: np.ndarray, load_NE: np.ndarray, counts_NE: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Swaps, and replicas given to other experts, that lower the busiest bin, until none does; the
    table, and that bin's load [N].
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
    """Makes the best single change in each active problem, in place; returns which had one that
    helps, bool [active].
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
    """The busier bin's load after slot i of the busiest bin and slot j of bin b change places, [N,
    i, b, j]; inf where they may not.
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
    """The busiest touched bin's load, at most, after slot j of bin b becomes a replica of the
    expert in slot i of the busiest bin.

    [N, i, b, j]; inf where slot j has an expert's only replica or bin b has the new one.
    """
    row = np.arange(len(table))
    experts_NS = table[row, top]
    known = np.maximum(table, 0)
    others = counts[row[:, None, None], known] - 1
    if not np.any(others):
        return np.full((len(table), table.shape[2], *table.shape[1:]), np.inf)
    raised = (
        load[row[:, None, None], known] / np.maximum(others, 1) - weight
    )  # of each other replica of the expert that goes
    beside = _busiest_beside(table, busy, load.shape[1]) + raised
    shared = (load / (counts + 1))[
        row[:, None], experts_NS
    ]  # of each replica of the expert that comes
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
    """For each slot the load of the busiest other bin with the same expert, [N, B, S]; -inf where
    there is none.
    """
    problems, _, slots = table.shape
    row = np.arange(problems)[:, None]
    rising = np.repeat(np.argsort(busy, axis=1, kind="stable"), slots, axis=1)
    experts = np.take_along_axis(table, rising[:, ::slots, None], axis=1).reshape(
        problems, -1
    )  # EMPTY falls into a last place
    first, second = (np.full((problems, num_experts + 1), EMPTY) for _ in range(2))
    first[row, experts] = rising  # of equal indices the last, busiest, stays
    below = np.where(first[row, experts] == rising, num_experts, experts)
    second[row, below] = rising
    first, second = (
        np.where(bin_ == EMPTY, -np.inf, np.take_along_axis(busy, np.maximum(bin_, 0), axis=1))
        for bin_ in (first, second)
    )
    flat = table.reshape(problems, -1)
    holder = np.repeat(busy, slots, axis=1)
    # In the busiest bin itself the second counts; where two are equally busy, the second is as
    # busy.
    return np.where(holder == first[row, flat], second[row, flat], first[row, flat]).reshape(
        table.shape
    )
