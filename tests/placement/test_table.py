from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.placement.table import (
    EMPTY,
    Placement,
    contiguous,
    count_slots,
    round_robin,
    slot_sources,
)


def placement(*rows: list[int], experts: int, ranks: int = 1) -> Placement:
    return Placement(np.array(rows, np.int32), experts, ranks)


@pytest.mark.parametrize(
    ("experts", "ranks", "redundant", "slots"),
    [(8, 4, 0, 8), (8, 1, 0, 8), (6, 4, 0, 8), (1, 8, 0, 8), (8, 4, 1, 12), (7, 2, 2, 12)],
)
def test_every_rank_has_the_same_number_of_slots(experts, ranks, redundant, slots):
    assert count_slots(experts, ranks, redundant) == slots
    table = contiguous(3, experts, ranks, redundant)
    assert table.physical_to_logical.shape == (3, slots)
    assert table.num_slots == slots


def test_contiguous_gives_runs_of_experts_and_leaves_the_rest_empty():
    assert contiguous(2, 4, 2).physical_to_logical.tolist() == [[0, 1, 2, 3]] * 2
    assert contiguous(1, 6, 4).physical_to_logical.tolist() == [[0, 1, 2, 3, 4, 5, EMPTY, EMPTY]]
    assert contiguous(1, 6, 4).empty_slots == 2
    # Replicas of the next rank's experts: one's own would serve nothing.
    assert contiguous(1, 4, 2, redundant_slots=1).by_rank[0].tolist() == [[0, 1, 2], [2, 3, 0]]
    assert contiguous(1, 6, 4, redundant_slots=1).by_rank[0].tolist() == [
        [0, 1, 2],
        [2, 3, 4],
        [4, 5, 0],
        [EMPTY, EMPTY, 2],
    ]
    assert contiguous(1, 2, 1, redundant_slots=1).physical_to_logical.tolist() == [[0, 1, EMPTY]]


def test_round_robin_deals_experts_out():
    assert round_robin(2, 6, 4).by_rank[1].tolist() == [[0, 4], [1, 5], [2, EMPTY], [3, EMPTY]]
    assert round_robin(1, 8, 4, redundant_slots=1).by_rank[0].tolist() == [
        [0, 4, 1],
        [1, 5, 2],
        [2, 6, 3],
        [3, 7, 0],
    ]
    assert round_robin(1, 2, 1, redundant_slots=2).physical_to_logical.tolist() == [
        [0, 1, EMPTY, EMPTY]
    ]


@pytest.mark.parametrize("make", [contiguous, round_robin])
def test_every_shape_of_table_is_a_valid_one(make):
    for experts, ranks, redundant in itertools.product((1, 2, 5, 8), (1, 2, 3, 8), (0, 1, 3)):
        assert make(1, experts, ranks, redundant).num_slots == count_slots(
            experts, ranks, redundant
        )


def test_tables_of_replicas():
    table = placement([2, 0, 1, 2, EMPTY, 1], [0, 1, 2, EMPTY, 1, 0], experts=3, ranks=2)
    assert table.replica_count().tolist() == [[1, 2, 2], [2, 2, 1]]
    assert table.logical_to_physical().tolist() == [
        [[1, -1], [2, 5], [0, 3]],
        [[0, 5], [1, 4], [2, -1]],
    ]
    assert table.slots_of(1, 0).tolist() == [0, 5]
    assert table.replica_count().dtype == table.logical_to_physical().dtype == np.int32


def test_routing_lists_slots_by_expert_and_those_on_the_host_first():
    table = placement([2, 0, 1, 2, EMPTY, 1], experts=3, ranks=2)
    slots, start, replicas = table.routing()
    assert (slots.tolist(), start.tolist(), replicas.tolist()) == (
        [[[1, 2, 5, 0, 3, 4]]],
        [[0, 1, 3]],
        [[[1, 2, 2]]],
    )
    slots, start, replicas = table.routing(hosts=2)
    assert slots.tolist() == [[[1, 2, 5, 0, 3, 4], [1, 5, 2, 3, 0, 4]]]
    # Only host 0 has expert 0: host 1 uses that one.
    assert (start.tolist(), replicas.tolist()) == ([[0, 1, 3]], [[[1, 1, 1], [1, 1, 1]]])


def test_a_host_uses_its_own_replicas_and_all_where_it_has_none():
    """Four devices on two hosts: host 0 has expert 0 twice, host 1 expert 3 twice and no 1."""
    table = placement([0, 1, 0, 2, 3, 2, 0, 3], experts=4, ranks=4)
    slots, start, replicas = table.routing(hosts=2)
    assert replicas.tolist() == [[[2, 1, 1, 2], [1, 1, 1, 2]]]
    assert start.tolist() == [[0, 3, 4, 6]]
    assert slots.tolist() == [[[0, 2, 6, 1, 3, 5, 4, 7], [6, 0, 2, 1, 5, 3, 4, 7]]]


def test_tables_of_a_model_without_moe_layers():
    table = contiguous(0, 4, 2)
    assert table.replica_count().shape == (0, 4)
    assert table.logical_to_physical().shape == (0, 4, 1)
    assert [a.shape for a in table.routing(2)] == [(0, 2, 4), (0, 4), (0, 2, 4)]
    assert table.empty_slots == 0
    assert Placement.from_json(table.to_json()).num_slots == 4


def test_slot_sources_name_where_the_weights_are_now():
    old = placement([2, 0, 1, EMPTY], experts=3)
    new = placement([0, EMPTY, 1, 2], experts=3)
    assert slot_sources(old, new).tolist() == [[1, EMPTY, 2, 0]]
    assert slot_sources(new, new).tolist() == [[0, EMPTY, 2, 3]]
    # A slot that keeps its expert is its own source, and a replica on the same device comes before
    # one on another.
    old = placement([0, 1, 1, 2], experts=3, ranks=2)
    assert slot_sources(old, placement([1, 0, 2, 1], experts=3, ranks=2)).tolist() == [[1, 0, 3, 2]]
    assert slot_sources(old, placement([0, 2, 1, 2], experts=3, ranks=2)).tolist() == [[0, 3, 2, 3]]


def test_json_form_reads_back_and_its_version_is_checked():
    table = placement([2, 0, 1, EMPTY], [0, 2, 1, 2], experts=3, ranks=2)
    form = json.loads(json.dumps(table.to_json()))
    again = Placement.from_json(form)
    assert (again.num_experts, again.ranks) == (3, 2)
    np.testing.assert_array_equal(again.physical_to_logical, table.physical_to_logical)
    with pytest.raises(UserError, match="version 7"):
        Placement.from_json({**form, "version": 7})


def test_the_first_version_of_the_form_is_read_too():
    """It did not name devices."""
    form = {"version": 1, "num_experts": 3, "num_slots": 4, "physical_to_logical": [[2, 0, 1, -1]]}
    table = Placement.from_json(form)
    assert (table.num_experts, table.ranks, table.num_slots) == (3, 1, 4)
    with pytest.raises(UserError, match="version 0"):
        Placement.from_json({**form, "version": 0})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1, 2, 3], [0, 1, 3, 1]], "layer 1 leaves expert 2 without a slot"),
        ([[0, 1, 2, 2, 3, 3]], "layer 0 has expert 3 twice on device 1"),
        ([[0, 1, 2, 4]], "layer 0 names expert 4"),
        ([[0, 1, 2, -2]], "layer 0 names expert -2"),
        ([0, 1, 2, 3], "must be"),
        ([[0, 1, 2, 3, 0]], "must be"),
    ],
)
def test_a_wrong_table_is_refused(rows, message):
    with pytest.raises(UserError, match=message):
        Placement(np.array(rows, np.int32), 4, 2)


def test_a_table_keeps_its_own_copy_which_nobody_can_change():
    array = np.array([[0, 1, 2, 3]])
    table = Placement(array, 4, 2)
    array[0, 0] = 3
    assert table.physical_to_logical.tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="read-only"):
        table.physical_to_logical[0, 0] = 3
    with pytest.raises(UserError, match="on each of 0 devices"):
        Placement(array, 4, 0)


def test_empty_slots_are_those_of_the_emptiest_layer():
    assert placement([0, 1, EMPTY, EMPTY], [0, 1, 1, 0], experts=2, ranks=2).empty_slots == 2
