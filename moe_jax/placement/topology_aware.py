"""Least time on the busiest device and the busiest link together, from measured traffic and the
topology.

Every layer starts from several tables: even load; greedy, with each expert where its tokens are;
the present table; and some random ones, more if layers are few and small. Single changes improve
them: two slots swap their experts, or a replica is replaced by one of another expert. For a small
table all changes are tried at each step; otherwise a few are drawn that touch the busiest device or
link. A change affects the rows of only two experts, so trying one costs O(R), not O(R E). The
search is this project's own; it minimises the cost in cost.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_jax.placement.balanced import (
    DISTURBANCE,
    LEAST_GAIN,
    balanced,
    deal,
    heaviest_first,
    refine,
    replicate,
)

ALL_CHANGES = 512  # up to so many possible changes, all are tried at each step
MOST_STARTS = 16  # per layer
RANDOM_STARTS = 160  # over all layers
LEAST_STEPS = 1000  # per start, if changes are drawn
DRAWN = 8  # changes tried at each step, if they are drawn
PATIENCE = 250  # steps without a gain after which a layer is finished
WORK = 1e7  # changes drawn x ranks over all layers and steps; this bounds the time


class _Links(NamedTuple):
    """What connects the ranks: hosts with equally many ranks, in order, and the weight of a row
    between hosts.
    """

    hosts: int
    between_weight: float


def topology_aware(
    traffic_LRE: np.ndarray,
    slots: int,
    hosts: int,
    between_weight: float,
    present_LRS: np.ndarray | None = None,
) -> np.ndarray:
    """The experts in the slots of each device, int32 [L, R, S], with the lowest cost found; R is a
    multiple of `hosts`.

    `between_weight` is Topology.between_weight. `present_LRS`, with the same shape, is one more
    table to start from.
    """
    layers, ranks, num_experts = traffic_LRE.shape
    even_LRS = balanced(traffic_LRE.sum(1), ranks, slots, hosts, 1, present_LRS)
    if not traffic_LRE.size or ranks == 1 or slots >= num_experts:
        return even_LRS  # there is nothing to choose: every device holds every expert
    links = _Links(hosts, between_weight)
    all_changes = _all_changes(ranks, slots) if 2 * (ranks * slots) ** 2 <= ALL_CHANGES else None
    most = MOST_STARTS if all_changes else int(WORK / (layers * ranks * DRAWN * LEAST_STEPS))
    starts = [even_LRS, _greedy(traffic_LRE, slots, even_LRS, links)] + (
        [] if present_LRS is None else [present_LRS]
    )
    starts += _random_starts(
        traffic_LRE.sum(1),
        ranks,
        slots,
        min(most, MOST_STARTS, RANDOM_STARTS // layers) - len(starts),
    )
    source_LER = np.ascontiguousarray(traffic_LRE.swapaxes(1, 2))
    tables_XLRS = _cheapest_first(np.array(starts), source_LER, links)[: max(most, 1)]
    tables_NRS = tables_XLRS.reshape(-1, ranks, slots)
    climbed_NRS = _climb(
        tables_NRS, np.tile(source_LER, (len(tables_XLRS), 1, 1)), links, all_changes
    )
    return _cheapest_first(climbed_NRS.reshape(tables_XLRS.shape), source_LER, links)[0]


def _cheapest_first(tables_XLRS: np.ndarray, source_LER: np.ndarray, links: _Links) -> np.ndarray:
    """The tables of each layer by rising cost."""
    experts = source_LER.shape[1]
    cost_XL = np.array(
        [
            _cost(_total(_holders(table_LRS, experts), source_LER, links), links)
            for table_LRS in tables_XLRS
        ]
    )
    return tables_XLRS[np.argsort(cost_XL, axis=0, kind="stable"), np.arange(len(source_LER))]


def _random_starts(load_LE: np.ndarray, ranks: int, slots: int, number: int) -> list[np.ndarray]:
    """Tables dealt out by disturbed loads, to devices in random order."""
    draw, tables = np.random.default_rng(0), []
    for _ in range(number):
        disturbed = load_LE * draw.lognormal(0.0, DISTURBANCE, load_LE.shape)
        counts = replicate(disturbed, ranks, slots)
        tables.append(deal(disturbed / counts, counts, ranks, slots)[:, draw.permutation(ranks)])
    return tables


def _greedy(traffic_LRE: np.ndarray, slots: int, even_LRS: np.ndarray, links: _Links) -> np.ndarray:
    """Replicas, heaviest first, each to the host where load and rows between hosts grow least; then
    evenly within each host.
    """
    layers, ranks, num_experts = traffic_LRE.shape
    hosts, share = links.hosts, ranks // links.hosts
    source_LHE = traffic_LRE.reshape(layers, hosts, share, num_experts).sum(2)
    load_LE = source_LHE.sum(1)
    counts_LE = replicate(load_LE, ranks, slots)
    held_LHE = np.zeros((layers, hosts, num_experts), np.int64)
    room_LH = np.full((layers, hosts), share * slots)
    busy_LH, rows_LH = np.zeros((layers, hosts)), np.zeros((layers, hosts))
    layer, stuck_L = np.arange(layers), np.zeros(layers, bool)
    for expert_L in heaviest_first(load_LE / counts_LE, counts_LE, ranks * slots).T:
        weight_L1, count_L1 = (
            (load_LE / counts_LE)[layer, expert_L, None],
            counts_LE[layer, expert_L, None],
        )
        source_LH, held_LH = source_LHE[layer, :, expert_L], held_LHE[layer, :, expert_L]
        # Rows that come from other hosts, minus those that stay on this one.
        more_LH = weight_L1 - source_LH / count_L1 - source_LH * (held_LH == 0)
        score_LH = (busy_LH + weight_L1) / share + links.between_weight * (rows_LH + more_LH)
        host_L = np.argmin(np.where((room_LH > 0) & (held_LH < share), score_LH, np.inf), axis=1)
        stuck_L |= (room_LH[layer, host_L] == 0) | (held_LH[layer, host_L] == share)
        held_LHE[layer, host_L, expert_L] += 1
        room_LH[layer, host_L] -= 1
        busy_LH[layer, host_L] += weight_L1[:, 0]
        rows_LH[layer, host_L] += more_LH[layer, host_L]
    far_LE = np.sum(source_LHE * (held_LHE == 0), axis=1) / counts_LE
    weight_LHE = np.where(held_LHE > 0, source_LHE / np.maximum(held_LHE, 1) + far_LE[:, None], 0.0)
    table_LRS = even_LRS.copy()
    weight_NE = weight_LHE[~stuck_L].reshape(-1, num_experts)
    dealt = deal(weight_NE, held_LHE[~stuck_L].reshape(-1, num_experts), share, slots)
    table_LRS[~stuck_L] = refine(dealt, weight_NE, np.ones(weight_NE.shape, np.int64))[0].reshape(
        -1, ranks, slots
    )
    return table_LRS


def _rows(held: np.ndarray, source: np.ndarray, links: _Links) -> np.ndarray:
    """The rows of experts, [..., 3 R + 2 H]: load, in and out of each device within its host, in
    and out of each host.

    `held` [..., R] says which devices hold the expert, `source` [..., R] how many of its rows each
    device sends.
    """
    split = (*held.shape[:-1], links.hosts, held.shape[-1] // links.hosts)
    held, source = held.reshape(split), source.reshape(split)
    here, rows = held.sum(-1, keepdims=True), source.sum(-1, keepdims=True)  # [..., H, 1]
    away = np.where(here > 0, 0.0, rows)
    each_away = away.sum(-2, keepdims=True) / here.sum(-2, keepdims=True)
    share = held / np.maximum(here, 1)
    load = share * rows + held * each_away
    out = np.where(here > 0, source, 0.0) - share * source
    flat = (*split[:-2], -1)
    parts = (load, share * (rows - source), out, here * each_away, away)
    return np.concatenate([part.reshape(flat) for part in parts], axis=-1)


def _cost(total: np.ndarray, links: _Links) -> np.ndarray:
    """The cost of sums of `_rows`, [...]; what cost.py computes from the rows between ranks."""
    ranks = (total.shape[-1] - 2 * links.hosts) // 3
    within = total[..., ranks : 3 * ranks].max(-1)
    return total[..., :ranks].max(-1) + np.maximum(
        within, links.between_weight * total[..., 3 * ranks :].max(-1)
    )


def _holders(table_NRS: np.ndarray, num_experts: int) -> np.ndarray:
    """Which devices hold each expert, float64 [N, E, R]."""
    problems, ranks, _ = table_NRS.shape
    held_NER = np.zeros((problems, num_experts, ranks))
    held_NER[np.arange(problems)[:, None, None], table_NRS, np.arange(ranks)[:, None]] = 1
    return held_NER


def _total(held_NER: np.ndarray, source_NER: np.ndarray, links: _Links) -> np.ndarray:
    """Sums of `_rows` over the experts, [N, 3 R + 2 H], one problem after another: all at once
    would need much memory.
    """
    return np.array(
        [
            _rows(held, source, links).sum(0)
            for held, source in zip(held_NER, source_NER, strict=True)
        ]
    )


def _climb(
    table_NRS: np.ndarray,
    source_NER: np.ndarray,
    links: _Links,
    changes: tuple[np.ndarray, ...] | None,
) -> np.ndarray:
    """The tables after changes that each lower the cost of their problem; at each step all
    `changes` are tried, or random ones if they are None.
    """
    table_NRS, held_NER = table_NRS.copy(), _holders(table_NRS, source_NER.shape[1])
    total_NV = _total(held_NER, source_NER, links)
    draw, failed_N = np.random.default_rng(0), np.zeros(len(table_NRS), int)
    active_N, work = np.arange(len(table_NRS)), 0.0
    while active_N.size and (changes is not None or work < WORK):
        drawn = (
            _draw_changes(draw, table_NRS.shape, total_NV[active_N], links)
            if changes is None
            else changes
        )
        work += drawn[0].size * table_NRS.shape[1]
        improved = _step(table_NRS, held_NER, total_NV, source_NER, links, active_N, drawn)
        failed_N[active_N] = np.where(improved, 0, failed_N[active_N] + 1)
        active_N = active_N[failed_N[active_N] < (PATIENCE if changes is None else 1)]
    return table_NRS


def _step(
    table_NRS: np.ndarray,
    held_NER: np.ndarray,
    total_NV: np.ndarray,
    source_NER: np.ndarray,
    links: _Links,
    active_N: np.ndarray,
    changes: tuple[np.ndarray, ...],
) -> np.ndarray:
    """Makes the best of the changes in each active problem, in place, if it helps; returns where it
    does, bool [active].

    A change (device r, slot i, device q, slot j, swap), each [active, C] or [1, C], gives the
    expert of (r, i) to (q, j), and with `swap` that of (q, j) to (r, i).
    """
    row = active_N[:, None]
    r, i, q, j, swap = (np.broadcast_to(part, (len(active_N), part.shape[1])) for part in changes)
    given, taken = table_NRS[row, r, i], table_NRS[row, q, j]
    old = np.stack([held_NER[row, given], held_NER[row, taken]])
    at = np.arange(len(active_N))[:, None], np.arange(r.shape[1])
    last = ~swap & (old[1].sum(-1) < 2)
    legal = (old[0][*at, q] == 0) & ~last & ~(swap & (old[1][*at, r] > 0))
    new = old.copy()
    new[0][*at, q], new[1][*at, q] = 1, 0
    new[0][*at, r], new[1][*at, r] = ~swap, np.where(swap, 1, new[1][*at, r])
    new = np.where(legal[..., None], new, old)
    source = np.stack([source_NER[row, given], source_NER[row, taken]])
    total = total_NV[row] + (_rows(new, source, links) - _rows(old, source, links)).sum(0)
    costs = np.where(legal, _cost(total, links), np.inf)
    best = np.argmin(costs, axis=1)
    improved = costs[at[0][:, 0], best] < _cost(total_NV[active_N], links) * (1 - LEAST_GAIN)
    for place in np.flatnonzero(improved):
        pick, problem = (place, best[place]), active_N[place]
        table_NRS[problem, q[pick], j[pick]] = given[pick]
        if swap[pick]:
            table_NRS[problem, r[pick], i[pick]] = taken[pick]
        held_NER[problem, given[pick]], held_NER[problem, taken[pick]] = new[0][pick], new[1][pick]
        total_NV[problem] = total[pick]
    return improved


def _all_changes(ranks: int, slots: int) -> tuple[np.ndarray, ...]:
    """Every pair of slots of two devices, to swap (each pair once) and to replace."""
    a, b, swap = (
        part.reshape(1, -1)
        for part in np.meshgrid(*[np.arange(ranks * slots)] * 2, [False, True], indexing="ij")
    )
    kept = (a // slots != b // slots) & (~swap | (a < b))
    a, b, swap = a[kept][None], b[kept][None], swap[kept][None]
    return a // slots, a % slots, b // slots, b % slots, swap


def _draw_changes(
    draw: np.random.Generator, shape: tuple[int, ...], total: np.ndarray, links: _Links
) -> tuple[np.ndarray, ...]:
    """Random changes: half of them touch the busiest device, half an end of the busiest link."""
    problems, ranks, slots, share = len(total), shape[1], shape[2], shape[1] // links.hosts
    device_N = total[:, :ranks].argmax(1)
    weighed = np.concatenate(
        [total[:, ranks : 3 * ranks], total[:, 3 * ranks :] * links.between_weight], axis=1
    )
    link_N1 = weighed.argmax(1)[:, None]
    size = (problems, DRAWN)
    of_host = (link_N1 - 2 * ranks) % links.hosts * share + draw.integers(share, size=size)
    end = np.where(link_N1 < 2 * ranks, link_N1 % ranks, of_host)
    first = np.where(np.arange(DRAWN) % 2, end, device_N[:, None])
    other = (first + draw.integers(1, ranks, size=size)) % ranks
    reversed_ = draw.random(size) < 0.25
    slot = draw.integers(slots, size=(2, *size))
    swap = draw.random(size) < 0.5
    source, target = np.where(reversed_, other, first), np.where(reversed_, first, other)
    return source, slot[0], target, slot[1], swap


def link_rows_by_part(table_LRS: np.ndarray, traffic_LRE: np.ndarray, hosts: int) -> np.ndarray:
    """Rows over the link of each device within its host, the larger of in and out, if it had the
    part of another device of the host.

    float64 [L, H, device of the host, part of the host]; the diagonal is the table as it is. The
    loads, and the rows between hosts, do not change when parts change places within a host.
    """
    layers, ranks, num_experts = traffic_LRE.shape
    split = (hosts, ranks // hosts, num_experts)
    rows_LHDD = np.empty((layers, hosts, split[1], split[1]))
    for layer, (table_RS, source_RE) in enumerate(zip(table_LRS, traffic_LRE, strict=True)):
        held_HDE = np.zeros(
            (ranks, num_experts + 1)
        )  # EMPTY falls into the place after the experts
        held_HDE[np.arange(ranks)[:, None], table_RS] = 1
        held_HDE, source_HDE = held_HDE[:, :-1].reshape(split), source_RE.reshape(split)
        count_HE = held_HDE.sum(1)
        share_HED = (held_HDE / np.maximum(count_HE, 1)[:, None]).swapaxes(1, 2)
        kept_HDD = source_HDE @ share_HED
        arrive_HD = np.sum(source_HDE.sum(1)[..., None] * share_HED, axis=1)
        leave_HD = np.sum(source_HDE * (count_HE > 0)[:, None], axis=2)
        rows_LHDD[layer] = np.maximum(arrive_HD[:, None], leave_HD[..., None]) - kept_HDD
    return rows_LHDD
