"""What a placement costs under measured traffic: rows that each device computes, rows over each
link, and the busiest of both.

    traffic = planned_traffic(placement, traffic_LRE, topology.host_of_rank(ranks))
    max_over_mean(traffic.load_LR)                                # 1 is even
    link_rows(traffic.sent_LRR, host_R, topology.between_weight)  # of the busiest link
    cost(traffic, host_R, topology.between_weight)                # what the planners minimise

Rows are (token, choice) pairs: the activation of a token that goes to one expert. Exact for float
counts; nothing is sampled.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_jax.placement.table import EMPTY, Placement


class PlannedTraffic(NamedTuple):
    """Where the rows of a window of steps go, float64."""

    load_LR: np.ndarray  # rows that the experts of each rank compute
    sent_LRR: np.ndarray  # rows from each source rank to each destination rank, itself included


def planned_traffic(
    placement: Placement, traffic_LRE: np.ndarray, host_R: np.ndarray
) -> PlannedTraffic:
    """The rows between ranks when the choices `traffic_LRE` (of source ranks, for experts) follow
    `Placement.routing`.
    """
    by_rank, shares_LHP = placement.by_rank, replica_shares(placement, host_R)
    layers, ranks, slots = by_rank.shape
    sent_LRR = np.zeros((layers, ranks, ranks))
    for layer in range(layers):  # one by one: [R, P] is large for many ranks
        rows_RP = (
            traffic_LRE[layer][:, np.maximum(placement.physical_to_logical[layer], 0)]
            * shares_LHP[layer][host_R]
        )
        sent_LRR[layer] = rows_RP.reshape(ranks, ranks, slots).sum(-1)
    return PlannedTraffic(sent_LRR.sum(1), sent_LRR)


def replica_shares(placement: Placement, host_R: np.ndarray) -> np.ndarray:
    """Of the choices that each host makes of the expert in a slot, the share that goes to that
    slot, float64 [L, H, P]; 0 for EMPTY.

    That is `Placement.routing` without the turns: replicas that take turns get equal shares.
    """
    slots_LHP, start_LE, replicas_LHE = placement.routing(int(host_R.max()) + 1)
    shares_LHP = np.empty(slots_LHP.shape)
    for layer, table_P in enumerate(placement.physical_to_logical):
        # Every host has the slots in the same order of experts, so place p has one expert.
        expert_P = table_P[slots_LHP[layer, 0]]
        replica_P = np.arange(placement.num_slots) - start_LE[layer, expert_P]
        used_HP = replicas_LHE[layer][:, expert_P]
        in_turn_HP = (expert_P != EMPTY) & (replica_P < used_HP)
        placed_HP = np.where(in_turn_HP, 1 / used_HP, 0.0)
        np.put_along_axis(shares_LHP[layer], slots_LHP[layer], placed_HP, axis=-1)
    return shares_LHP


def max_over_mean(load_LR: np.ndarray) -> np.ndarray:
    """Load of the busiest device divided by the mean, float64 [L] (a number for [R]); 1 if there is
    no load.
    """
    mean_L = load_LR.mean(-1)
    return np.where(mean_L > 0, load_LR.max(-1, initial=0) / np.where(mean_L > 0, mean_L, 1), 1.0)


def link_rows(sent_LRR: np.ndarray, host_R: np.ndarray, between_weight: float = 1.0) -> np.ndarray:
    """Rows over the busiest link, float64 [L], the larger of in and out.

    The link of a device carries its rows from and to other devices of its host. The link of a host,
    which its devices share, carries those from and to other hosts; they count `between_weight`
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


def cost(traffic: PlannedTraffic, host_R: np.ndarray, between_weight: float = 1.0) -> np.ndarray:
    """Rows of the busiest device plus rows of the busiest link, float64 [L]: what topology-aware
    planning minimises.
    """
    return traffic.load_LR.max(-1, initial=0) + link_rows(traffic.sent_LRR, host_R, between_weight)
