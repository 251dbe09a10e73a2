"""What a placement costs under measured traffic: rows each device computes, rows over each link,
and the busiest of both.

    found = flow(placement, traffic_LRE, topology.host_of_rank(ranks))
    max_over_mean(found.load_LR)                              # 1 is even
    link_rows(found.sent_LRR, host_R, topology.between_weight)  # of the busiest link
    cost(found, host_R, topology.between_weight)              # what the planners minimise

Rows are (token, choice) pairs: a token's activation that goes to one expert. Exact for float
counts, nothing sampled.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_jax.placement.table import EMPTY, Placement


class PlannedTraffic(NamedTuple):
    """Where the rows of a window of steps go: float64."""

    load_LR: np.ndarray  # rows that each rank's experts compute
    sent_LRR: np.ndarray  # rows from each source rank to each destination rank, itself included


def planned_traffic(
    placement: Placement, traffic_LRE: np.ndarray, host_R: np.ndarray
) -> PlannedTraffic:
    """The rows between ranks when `traffic_LRE` choices (of source ranks, for experts) follow the
    routing rule.

    A source's rows for an expert go evenly to its replicas on the source's own host or, where there
    is none, to all.
    """
    by_rank, shares_LHP = placement.by_rank, replica_shares(placement, host_R)
    layers, ranks, slots = by_rank.shape
    sent_LRR = np.zeros((layers, ranks, ranks))
    for layer in range(layers):  # one at a time: [R, P] is large for many ranks
        rows_RP = (
            traffic_LRE[layer][:, np.maximum(placement.physical_to_logical[layer], 0)]
            * shares_LHP[layer][host_R]
        )
        sent_LRR[layer] = rows_RP.reshape(ranks, ranks, slots).sum(-1)
    return PlannedTraffic(sent_LRR.sum(1), sent_LRR)


def replica_shares(placement: Placement, host_R: np.ndarray) -> np.ndarray:
    """The share of its choices of a slot's expert that each source host sends to that slot, float64
    [L, H, P]; 0 for EMPTY.
    """
    table, hosts = placement.physical_to_logical, int(host_R.max()) + 1
    host_P = np.repeat(host_R, table.shape[1] // placement.ranks)
    counts_LHE = host_counts(placement, host_R)
    layer = np.arange(len(table))[:, None]
    own_LHP = np.stack(
        [counts_LHE[layer, host, np.maximum(table, 0)] for host in range(hosts)], axis=1
    )
    all_LP = counts_LHE.sum(1)[layer, np.maximum(table, 0)]
    is_own_HP = np.arange(hosts)[:, None] == host_P
    shares_LHP = np.where(
        own_LHP > 0, is_own_HP / np.maximum(own_LHP, 1), 1 / np.maximum(all_LP, 1)[:, None]
    )
    return np.where(table[:, None] == EMPTY, 0.0, shares_LHP)


def host_counts(placement: Placement, host_R: np.ndarray) -> np.ndarray:
    """Replicas of each expert on each host, int32 [L, H, E]."""
    table = placement.physical_to_logical
    host_P = np.repeat(host_R, table.shape[1] // placement.ranks)
    counts_LHE = np.zeros(
        (len(table), int(host_R.max()) + 1, placement.num_experts + 1), np.int32
    )  # EMPTY counts in the last place
    np.add.at(counts_LHE, (np.arange(len(table))[:, None], host_P, table), 1)
    return counts_LHE[..., :-1]


def max_over_mean(load_LR: np.ndarray) -> np.ndarray:
    """How much busier than the mean the busiest device is, float64 [L] (or a number, of [R]); 1
    where nothing is to be done.
    """
    mean_L = load_LR.mean(-1)
    return np.where(mean_L > 0, load_LR.max(-1, initial=0) / np.where(mean_L > 0, mean_L, 1), 1.0)


def link_rows(sent_LRR: np.ndarray, host_R: np.ndarray, between_weight: float = 1.0) -> np.ndarray:
    """Rows over the busiest link, float64 [L], the larger of in and out.

    A device's link carries its rows from and to other devices of its host; a host's link, which
    its devices share, those from and to other hosts. The latter count `between_weight`
    (bandwidth_within / bandwidth_between) times, so that equal rows take equal time.
    """
    within_RR = (host_R[:, None] == host_R) & ~np.eye(len(host_R), dtype=bool)
    on_host_RH = (host_R[:, None] == np.arange(int(host_R.max()) + 1)).astype(float)
    between_LHH = on_host_RH.T @ sent_LRR @ on_host_RH * (1 - np.eye(on_host_RH.shape[1]))
    within_LRR = sent_LRR * within_RR
    device_L = np.maximum(
        within_LRR.sum(1).max(-1, initial=0), within_LRR.sum(2).max(-1, initial=0)
    )
    host_L = np.maximum(
        between_LHH.sum(1).max(-1, initial=0), between_LHH.sum(2).max(-1, initial=0)
    )
    return np.maximum(device_L, host_L * between_weight)


def cost(found: PlannedTraffic, host_R: np.ndarray, between_weight: float = 1.0) -> np.ndarray:
    """Rows of the busiest device plus rows of the busiest link, float64 [L]: what topology-aware
    planning minimises.
    """
    return found.load_LR.max(-1, initial=0) + link_rows(found.sent_LRR, host_R, between_weight)
