"""Which host each rank is on, the checks of a topology, and its file."""

from __future__ import annotations

import pytest

from moe_jax.errors import UserError
from moe_jax.placement.files import read_topology
from moe_jax.placement.topology import Topology, one_host
from tests.support import ROOT

EXAMPLE = ROOT / "configs" / "placement" / "topology.yaml"


def topology(hosts: int, devices: int, **changed: float) -> Topology:
    values = {
        "bandwidth_within": 4e11,
        "bandwidth_between": 1e11,
        "latency_within": 1e-6,
        "latency_between": 1e-5,
    } | changed
    return Topology(hosts, devices, **values)


@pytest.mark.parametrize(
    ("hosts", "devices", "ranks", "tensor", "expected"),
    [
        (1, 4, 4, 1, [0, 0, 0, 0]),
        (2, 2, 4, 1, [0, 0, 1, 1]),
        (2, 4, 4, 1, [0, 0, 0, 0]),  # a data row a host
        (4, 2, 4, 1, [0, 0, 1, 1]),  # a data row on two hosts
        (2, 4, 4, 2, [0, 0, 1, 1]),
        (2, 4, 1, 1, [0]),
        (3, 2, 6, 1, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_ranks_lie_over_hosts_in_the_order_of_the_mesh(hosts, devices, ranks, tensor, expected):
    assert topology(hosts, devices).host_of_rank(ranks, tensor).tolist() == expected


@pytest.mark.parametrize(
    ("hosts", "devices", "ranks", "tensor", "words"),
    [
        (2, 4, 3, 1, "3 ranks x tensor=1 do not divide"),
        (3, 4, 6, 1, "cut the mesh's data rows of 6 devices"),
        (3, 4, 4, 3, "do not fit into hosts of 4 devices"),
    ],
)
def test_a_mesh_that_lies_unevenly_is_refused(hosts, devices, ranks, tensor, words):
    with pytest.raises(UserError, match=words):
        topology(hosts, devices).host_of_rank(ranks, tensor)


@pytest.mark.parametrize(
    "changed",
    [
        {"bandwidth_within": 0.0},
        {"bandwidth_between": float("inf")},
        {"latency_within": -1e-9},
        {"latency_between": float("inf")},
        {"memory": 0},
    ],
)
def test_impossible_numbers_are_refused(changed):
    with pytest.raises(UserError, match=next(iter(changed))):
        topology(2, 2, **changed)


def test_the_least_that_a_topology_may_say():
    """Messages without latency, one device, one byte."""
    least = topology(1, 1, latency_within=0.0, latency_between=0.0, memory=1)
    assert least.devices == 1 and least.memory == 1


def test_weights_and_one_host():
    assert topology(2, 4).between_weight == 4
    assert topology(2, 4).devices == 8
    assert one_host(3).tolist() == [0, 0, 0]


def test_the_example_file_reads():
    found = read_topology(EXAMPLE, devices=8)
    assert (found.hosts, found.devices_per_host, found.memory) == (2, 4, 80 * 2**30)
    assert found.between_weight == 2.25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("hosts: 2", "hosts: 3"), "hosts=3 x devices_per_host=4 = 12 devices, but the mesh has 8"),
        (("hosts: 2", "host: 2"), "there is no key 'host'; did you mean hosts"),
        (
            ("bandwidth_within:", "bandwidth:"),
            "there is no key 'bandwidth'; did you mean bandwidth_within or bandwidth_between?",
        ),
        (("hosts: 2", "hosts: two"), "hosts='two' must be a whole number"),
        (("hosts: 2", "hosts: 0"), "hosts=0: it must be a finite number above 0"),
        (("hosts: 2\n", ""), "leaves out hosts"),
        (("hosts: 2", "hosts 2"), "broken YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(change, words, tmp_path):
    path = tmp_path / "links.yaml"
    path.write_text(EXAMPLE.read_text().replace(*change))
    with pytest.raises(UserError, match=r"links\.yaml") as caught:
        read_topology(path, devices=8)
    assert words in str(caught.value)
    with pytest.raises(UserError, match="no such file; give the path of a topology in YAML"):
        read_topology(tmp_path / "nowhere.yaml")
