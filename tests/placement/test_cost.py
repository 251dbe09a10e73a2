"""Flow and cost, by hand for two hosts of two devices."""

from __future__ import annotations

import numpy as np

from moe_jax.placement.cost import (
    cost,
    link_rows,
    max_over_mean,
    planned_traffic,
    replica_shares,
)
from moe_jax.placement.table import EMPTY, Placement, contiguous

HOSTS = np.array([0, 0, 1, 1], np.int32)
# Three experts; expert 0 on host 0 twice, expert 1 on both hosts, expert 2 on host 1.
TABLE = Placement(np.array([[0, EMPTY, 0, 1, 1, EMPTY, 2, EMPTY]], np.int32), 3, 4)
TRAFFIC = np.array([[[8, 4, 2], [0, 2, 6], [4, 10, 0], [2, 0, 1]]], float)


def test_replicas_of_the_own_host_come_first_and_share_evenly():
    assert TABLE.host_counts(2).tolist() == [[[2, 1, 0], [0, 1, 1]]]
    assert replica_shares(TABLE, HOSTS)[0].tolist() == [
        [0.5, 0, 0.5, 1, 0, 0, 1, 0],
        [0.5, 0, 0.5, 0, 1, 0, 1, 0],
    ]
    found = planned_traffic(TABLE, TRAFFIC, HOSTS)
    assert found.sent_LRR[0].tolist() == [[4, 8, 0, 2], [0, 2, 0, 6], [2, 2, 10, 0], [1, 1, 0, 1]]
    assert found.load_LR.tolist() == [[7, 13, 10, 9]]
    assert found.load_LR.sum() == TRAFFIC.sum()


def test_the_busiest_link_is_a_devices_or_a_hosts():
    sent = planned_traffic(TABLE, TRAFFIC, HOSTS).sent_LRR
    # Device 0 sends 8 to device 1; host 0 sends 2 + 6 to host 1, host 1 sends 6 back.
    assert link_rows(sent, HOSTS).tolist() == [8]
    assert link_rows(sent, HOSTS, 2.5).tolist() == [20]
    assert cost(planned_traffic(TABLE, TRAFFIC, HOSTS), HOSTS, 2.5).tolist() == [33]
    assert cost(planned_traffic(TABLE, TRAFFIC, HOSTS), HOSTS).tolist() == [13 + 8]
    # On one host expert 0's and 1's replicas share all rows; device 1 gets most from others.
    one = np.zeros(4, np.int32)
    found = planned_traffic(TABLE, TRAFFIC, one)
    assert found.load_LR.tolist() == [[7, 15, 8, 9]]
    assert link_rows(found.sent_LRR, one).tolist() == [15 - 0 - 1]


def test_what_comes_in_counts_as_what_goes_out():
    """Three devices, of one host or each a host: one sends to both others, or gets from both."""
    sent = np.array([[[9.0, 5, 3], [1, 9, 0], [0, 2, 9]]])
    for flow in (sent, sent.swapaxes(1, 2)):
        assert link_rows(flow, np.zeros(3, np.int32)).tolist() == [8]
        assert link_rows(flow, np.arange(3, dtype=np.int32), 10.0).tolist() == [80]
    # Two devices of host 0 share its link to host 1, whose only device gets 3 + 2 rows.
    assert link_rows(sent, np.array([0, 0, 1], np.int32), 10.0).tolist() == [30]
    assert link_rows(sent, np.array([0, 0, 1], np.int32)).tolist() == [5]


def test_max_over_mean_and_nothing_at_all():
    assert max_over_mean(np.array([[1.0, 3.0], [0.0, 0.0]])).tolist() == [1.5, 1.0]
    assert max_over_mean(np.array([1.0, 3.0])) == 1.5  # one layer alone
    none = planned_traffic(contiguous(0, 3, 4), TRAFFIC[:0], HOSTS)
    assert none.sent_LRR.shape == (0, 4, 4) and cost(none, HOSTS).shape == max_over_mean(
        none.load_LR
    ).shape == (0,)
    idle = planned_traffic(TABLE, TRAFFIC * 0, HOSTS)
    assert cost(idle, HOSTS).tolist() == [0] and max_over_mean(idle.load_LR).tolist() == [1]
