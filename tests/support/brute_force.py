"""The best placement by trying them all, at sizes where that is possible: what the planners are
measured against.

every = Every(num_experts=5, ranks=4, slots=2, hosts=2)
every.lowest_load(load_LE)                    # of the busiest device, replicas sharing evenly
every.lowest_cost(traffic_LRE, between_weight)
"""

from __future__ import annotations

import itertools

import numpy as np

from moe_jax.placement.cost import PlannedTraffic, cost, planned_traffic, replica_shares
from moe_jax.placement.table import Placement


class Every:
    """All placements of one shape with full devices, M of them, and the shares of each expert's
    rows that they send where.
    """

    def __init__(self, num_experts: int, ranks: int, slots: int, hosts: int = 1) -> None:
        self.host_R = (np.arange(ranks) * hosts // ranks).astype(np.int32)
        held = list(itertools.combinations(range(num_experts), min(slots, num_experts)))
        choices = np.array(list(itertools.product(range(len(held)), repeat=ranks)))
        table_MP = np.array(held)[choices].reshape(len(choices), -1)
        complete_M = np.all(np.any(table_MP[:, :, None] == np.arange(num_experts), axis=1), axis=1)
        self.all = Placement(table_MP[complete_M], num_experts, ranks)
        shares_MHP = replica_shares(self.all, self.host_R)
        holds_MPE = (self.all.physical_to_logical[:, :, None] == np.arange(num_experts)).astype(
            float
        )
        each = min(slots, num_experts)
        parts = (shares_MHP[..., None] * holds_MPE[:, None]).reshape(
            *shares_MHP.shape[:2], ranks, each, num_experts
        )
        self._shares_HMRE = np.ascontiguousarray(parts.sum(3).swapaxes(0, 1))

    def lowest_load(self, load_LE: np.ndarray) -> np.ndarray:
        """Load of the busiest device in the most even placement, [L]; for one host."""
        assert not self.host_R.any()
        return np.array([(self._shares_HMRE[0] @ load_E).max(-1).min() for load_E in load_LE])

    def lowest_cost(self, traffic_LRE: np.ndarray, between_weight: float) -> np.ndarray:
        """The lowest cost of a placement, [L]."""
        return np.array(
            [self._costs(traffic_RE, between_weight).min() for traffic_RE in traffic_LRE]
        )

    def _costs(self, traffic_RE: np.ndarray, between_weight: float) -> np.ndarray:
        sent_RMR = np.stack(
            [
                self._shares_HMRE[host] @ rows_E
                for host, rows_E in zip(self.host_R, traffic_RE, strict=True)
            ]
        )
        sent_MRR = sent_RMR.swapaxes(0, 1)
        return cost(PlannedTraffic(sent_MRR.sum(1), sent_MRR), self.host_R, between_weight)


def placement_cost(
    placement: Placement, traffic_LRE: np.ndarray, host_R: np.ndarray, between_weight: float
) -> np.ndarray:
    """The cost of given tables, [L]."""
    return cost(planned_traffic(placement, traffic_LRE, host_R), host_R, between_weight)
