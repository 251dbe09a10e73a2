"""The planners: near the best by brute force, better than stated on skewed loads, and at home at
the edges.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.placement.cost import cost, max_over_mean, planned_traffic
from moe_jax.placement.plan import plan_placement
from moe_jax.placement.relabel import moves, relabel
from moe_jax.placement.table import EMPTY, Placement, contiguous, round_robin
from moe_jax.placement.topology import Topology, one_host
from moe_jax.placement.topology_aware import link_rows_by_part
from tests.support.brute_force import Every, placement_cost

every = functools.cache(Every)


def topology(hosts: int, devices: int, weight: float = 4.0) -> Topology:
    return Topology(hosts, devices, weight * 1e11, 1e11, 1e-6, 1e-5)


def skewed(layers: int, ranks: int, experts: int, seed: int = 0) -> np.ndarray:
    """Traffic [L, R, E] with busy experts, and ranks that prefer some."""
    draw = np.random.default_rng(seed)
    return (
        100
        * draw.lognormal(0, 0.8, (layers, 1, experts))
        * draw.lognormal(0, 0.8, (layers, ranks, experts))
    )


def planned(
    strategy: str,
    traffic: np.ndarray,
    redundant: int = 0,
    where: Topology | None = None,
    present=None,
    **options,
) -> Placement:
    return plan_placement(
        strategy,
        traffic,
        ranks=traffic.shape[1],
        redundant_slots=redundant,
        topology=where,
        present=present,
        **options,
    )


# Experts, ranks, redundant slots: with and without replicas, more devices than experts, one expert
# a device.
EVEN_CASES = [
    (6, 3, 0),
    (8, 2, 0),
    (8, 2, 1),
    (9, 3, 0),
    (6, 3, 1),
    (5, 4, 0),
    (6, 4, 0),
    (3, 4, 0),
    (4, 4, 1),
    (4, 5, 1),
]


def test_balanced_is_within_5_percent_of_the_best_in_200_cases():
    gaps = []
    for experts, ranks, redundant in EVEN_CASES:
        load = np.random.default_rng(experts * ranks).lognormal(0, 0.8, (20, experts))
        table = plan_placement(
            "balanced",
            load[:, None],
            ranks=ranks,
            redundant_slots=redundant,
            topology=None,
            present=None,
        )
        busiest = planned_traffic(
            table, np.repeat(load[:, None], ranks, axis=1) / ranks, one_host(ranks)
        ).load_LR.max(1)
        gaps.append(busiest / every(experts, ranks, table.num_slots // ranks).lowest_load(load) - 1)
    assert np.size(gaps) == 200 and np.min(gaps) > -1e-9
    assert np.mean(gaps) < 0.005 and np.max(gaps) < 0.05


# Experts, ranks, redundant slots, hosts.
LINK_CASES = [
    (6, 4, 0, 2), (5, 4, 0, 2), (4, 4, 1, 2), (4, 4, 0, 2), (8, 4, 0, 2), (6, 3, 0, 3),
    (6, 3, 1, 1), (4, 4, 1, 4), (8, 2, 1, 2), (3, 6, 0, 2),
]  # fmt: skip


@pytest.mark.slow
def test_topology_aware_is_within_10_percent_of_the_best_in_200_cases():
    gaps = []
    for experts, ranks, redundant, hosts in LINK_CASES:
        traffic = skewed(10, ranks, experts, seed=experts * ranks)
        for weight in (1.0, 4.0):
            where = topology(hosts, ranks // hosts, weight)
            table = planned("topology_aware", traffic, redundant, where)
            best = every(experts, ranks, table.num_slots // ranks, hosts).lowest_cost(
                traffic, weight
            )
            gaps.append(
                placement_cost(table, traffic, where.host_of_rank(ranks), weight) / best - 1
            )
    assert np.size(gaps) == 200 and np.min(gaps) > -1e-9
    assert np.mean(gaps) < 0.005 and np.max(gaps) < 0.10


@pytest.mark.parametrize(
    ("experts", "ranks", "stated"),
    [
        (256, 16, (1.02, 1.00)),
        (128, 16, (1.12, 1.01)),
        (64, 16, (1.38, 1.02)),
        (256, 64, (1.86, 1.02)),
    ],
)
def test_balanced_is_as_even_as_stated_on_lognormal_loads(experts, ranks, stated):
    load = np.random.default_rng(0).lognormal(0, 0.8, (100, 1, experts))
    for redundant, most in enumerate(stated):
        table = plan_placement(
            "balanced", load, ranks=ranks, redundant_slots=redundant, topology=None, present=None
        )
        spread = np.repeat(load, ranks, axis=1) / ranks
        reached = max_over_mean(planned_traffic(table, spread, one_host(ranks)).load_LR).mean()
        if not redundant:
            # The largest of 256 draws differs much from sample to sample, and without replicas its
            # device has all of it, with the smallest beside it at best.
            rising = np.sort(load[:, 0], axis=1)
            least = rising[:, -1] + rising[:, : experts // ranks - 1].sum(1)
            most = max(most, 1.005 * np.mean(np.maximum(least / load.sum((1, 2)) * ranks, 1)))
        assert reached < most + 0.005


def test_every_slot_is_filled_and_replicas_are_spread_over_hosts():
    where = topology(2, 4)
    for strategy in ("balanced", "topology_aware"):
        table = planned(strategy, np.ones((2, 8, 4)), 0, where)
        assert table.empty_slots == 0
        on_host = table.physical_to_logical.reshape(2, 2, 4)
        assert np.all(np.sort(on_host) == [0, 1, 2, 3])  # two replicas each, one on each host
        assert planned(strategy, skewed(3, 4, 6), 1).empty_slots == 0


def test_groups_stay_on_one_host_each():
    table = planned("balanced", skewed(3, 8, 16), 1, topology(2, 4), groups=4)
    for layer in table.physical_to_logical.reshape(3, 2, -1):
        groups = [set((slots // 4).tolist()) for slots in layer]
        assert not groups[0] & groups[1] and len(groups[0]) == len(groups[1]) == 2


def test_topology_aware_keeps_rows_on_their_host():
    traffic = np.ones((1, 4, 8))
    traffic[:, :2, ::2] += 99  # host 0 asks for even experts, host 1 for odd ones
    traffic[:, 2:, 1::2] += 99
    where = topology(2, 2, 9.0)
    table = planned("topology_aware", traffic, 0, where)
    assert {tuple(sorted(host)) for host in table.physical_to_logical.reshape(2, 4).tolist()} == {
        (0, 2, 4, 6),
        (1, 3, 5, 7),
    }
    present = contiguous(1, 8, 4)
    host_R = where.host_of_rank(4)
    assert cost(planned_traffic(table, traffic, host_R), host_R, 9.0) < 0.3 * cost(
        planned_traffic(present, traffic, host_R), host_R, 9.0
    )


def test_larger_tables_improve_on_all_starts():
    traffic, where = skewed(2, 16, 64), topology(4, 4)
    host_R = where.host_of_rank(16)
    reach = {
        name: cost(
            planned_traffic(planned(name, traffic, 1, where), traffic, host_R),
            host_R,
            where.between_weight,
        ).sum()
        for name in ("contiguous", "balanced", "topology_aware")
    }
    assert reach["topology_aware"] < 0.9 * min(reach["contiguous"], reach["balanced"])


@pytest.mark.parametrize("strategy", ["contiguous", "round_robin", "balanced", "topology_aware"])
@pytest.mark.parametrize(
    ("layers", "ranks", "experts"),
    [(2, 1, 4), (2, 8, 3), (0, 4, 8), (2, 4, 8), (1, 2, 1), (1, 24, 5)],
)
@pytest.mark.parametrize("redundant", [0, 2])
def test_edges(strategy, layers, ranks, experts, redundant):
    idle = np.zeros((layers, ranks, experts))
    for where in (None, topology(2, ranks // 2)) if ranks > 1 else (None,):
        table = planned(strategy, idle, redundant, where)
        assert len(table.physical_to_logical) == layers
        assert moves(planned(strategy, idle, redundant, where, present=table), table).sum() == 0


@pytest.mark.parametrize("strategy", ["balanced", "topology_aware"])
def test_planning_again_moves_little(strategy):
    traffic, where = skewed(3, 8, 32), topology(2, 4)
    table = planned(strategy, traffic, 1, where, contiguous(3, 32, 8, 1))
    assert (
        moves(planned(strategy, traffic, 1, where, table), table).sum()
        < 0.2 * table.physical_to_logical.size
    )
    similar = traffic * np.random.default_rng(1).lognormal(0, 0.05, traffic.shape)
    assert (
        moves(planned(strategy, similar, 1, where, table), table).sum()
        < 0.6 * moves(planned(strategy, similar, 1, where), table).sum()
    )


def test_relabelling_for_links_never_costs_anything():
    where = topology(2, 4)
    host_R, traffic, present = where.host_of_rank(8), skewed(6, 8, 32), round_robin(6, 32, 8, 1)
    free = planned("topology_aware", traffic, 1, where)
    bound = relabel(free, present, 2, rows_LHDD=link_rows_by_part(free.by_rank, traffic, 2))
    costs = [
        cost(planned_traffic(table, traffic, host_R), host_R, where.between_weight)
        for table in (bound, free)
    ]
    assert np.all(costs[0] <= costs[1] * (1 + 1e-9))
    assert moves(bound, present).sum() < moves(free, present).sum()


def test_rows_over_a_devices_link_with_anothers_part():
    traffic, table = skewed(1, 4, 6), contiguous(1, 6, 4)
    host_R = np.array([0, 0, 1, 1], np.int32)
    rows_HDD = link_rows_by_part(table.by_rank, traffic, 2)[0]
    for host, order in ((0, [1, 0, 2, 3]), (1, [0, 1, 3, 2])):
        turned = Placement(table.by_rank[:, order].reshape(1, -1), 6, 4)
        sent_RR = planned_traffic(turned, traffic, host_R).sent_LRR[
            0, 2 * host : 2 * host + 2, 2 * host : 2 * host + 2
        ]
        out, into = sent_RR[0, 1], sent_RR[1, 0]
        assert (
            rows_HDD[host, 0, 1]
            == pytest.approx(max(out, into))
            == pytest.approx(rows_HDD[host, 1, 0])
        )


def test_relabelling_by_hand():
    present = Placement(np.array([[0, 1, 2, 3, 4, EMPTY]], np.int32), 5, 3)
    new = Placement(np.array([[4, 3, 1, 2, 0, 1]], np.int32), 5, 3)
    # The part {0, 1} stays on device 0, each in its slot; expert 4 stays in its slot too.
    assert relabel(new, present).physical_to_logical.tolist() == [[0, 1, 2, 1, 4, 3]]
    assert moves(new, present).tolist() == [[2, 1, 2]] and moves(
        relabel(new, present), present
    ).tolist() == [[0, 1, 1]]
    # On hosts of one device nothing may change places, unless hosts may.
    assert relabel(new, present, 3).physical_to_logical.tolist() == [[4, 3, 2, 1, 0, 1]]
    assert moves(relabel(new, present, 3, swap_hosts=True), present).sum() == 2
    # Another number of slots: what stays on its device keeps its slot there, too.
    wider = Placement(np.array([[1, 3, 0, 2, 4, 3, 0, 1, 4]], np.int32), 5, 3)
    assert relabel(wider, present).physical_to_logical.tolist() == [[0, 1, 3, 2, 3, 4, 4, 0, 1]]


def test_traffic_of_other_sources_is_spread_evenly():
    load = skewed(2, 1, 8)
    for strategy in ("balanced", "topology_aware"):
        table = plan_placement(
            strategy, load, ranks=4, redundant_slots=0, topology=topology(2, 2), present=None
        )
        even = planned(strategy, np.repeat(load, 4, axis=1), 0, topology(2, 2))
        np.testing.assert_array_equal(table.physical_to_logical, even.physical_to_logical)


def test_an_unknown_strategy_is_refused():
    with pytest.raises(UserError, match=r"'evenly'.*balanced"):
        planned("evenly", skewed(1, 2, 4))
