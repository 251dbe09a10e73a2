from __future__ import annotations

import json

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.placement.table import EMPTY, Placement, contiguous, count_slots, slot_sources


def placement(*rows: list[int], experts: int) -> Placement:
    return Placement(np.array(rows, np.int32), experts)


@pytest.mark.parametrize(
    ("experts", "ranks", "redundant", "slots"), [(8, 4, 0, 8), (8, 1, 0, 8), (6, 4, 0, 8), (1, 8, 0, 8), (8, 4, 1, 12), (7, 2, 2, 12)]
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
    assert contiguous(1, 4, 2, redundant_slots=1).physical_to_logical.tolist() == [[0, 1, 0, 2, 3, 2]]
    assert contiguous(1, 4, 2, redundant_slots=1).empty_slots == 0
    # A rank without experts has nothing to copy.
    assert contiguous(1, 2, 4, redundant_slots=1).physical_to_logical.tolist() == [[0, 0, 1, 1, EMPTY, EMPTY, EMPTY, EMPTY]]


def test_tables_of_replicas():
    table = placement([2, 0, 1, 2, EMPTY, 2], [0, 1, 2, EMPTY, 1, 0], experts=3)
    assert table.replica_count().tolist() == [[1, 1, 3], [2, 2, 1]]
    assert table.max_replicas == 4
    # Slots in order, then the first again where an expert has fewer.
    assert table.logical_to_physical()[0].tolist() == [[1, 1, 1, 1], [2, 2, 2, 2], [0, 3, 5, 0]]
    assert table.logical_to_physical()[1].tolist() == [[0, 5, 0, 0], [1, 4, 1, 1], [2, 2, 2, 2]]
    assert table.replica_count().dtype == table.logical_to_physical().dtype == np.int32


def test_tables_of_a_model_without_moe_layers():
    table = contiguous(0, 4, 2)
    assert table.replica_count().shape == (0, 4)
    assert table.logical_to_physical().shape == (0, 4, 1)
    assert table.empty_slots == 0
    assert Placement.from_json(table.to_json()).num_slots == 4


def test_slot_sources_name_where_the_weights_are_now():
    old = placement([2, 0, 1, EMPTY], experts=3)
    new = placement([0, EMPTY, 1, 2], experts=3)
    assert slot_sources(old, new).tolist() == [[1, EMPTY, 2, 0]]
    # Replicas take the first copy; a change to itself moves nothing that is not a copy.
    old = placement([0, 1, 1, 2], experts=3)
    assert slot_sources(old, placement([1, 2, 0, 0], experts=3)).tolist() == [[1, 3, 0, 0]]
    assert slot_sources(new, new).tolist() == [[0, EMPTY, 2, 3]]


def test_json_form_reads_back_and_its_version_is_checked():
    table = placement([2, 0, 1, EMPTY], [0, 1, 2, 2], experts=3)
    form = json.loads(json.dumps(table.to_json()))
    again = Placement.from_json(form)
    assert again.num_experts == 3
    np.testing.assert_array_equal(again.physical_to_logical, table.physical_to_logical)
    with pytest.raises(UserError, match="version 7"):
        Placement.from_json({**form, "version": 7})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1, 2, 3], [0, 1, 3, 3]], "layer 1 leaves expert 2 without a slot"),
        ([[0, 1, 2, 4]], "layer 0 names expert 4"),
        ([[0, 1, 2, -2]], "layer 0 names expert -2"),
        ([0, 1, 2, 3], "must be"),
    ],
)
def test_a_wrong_table_is_refused(rows, message):
    with pytest.raises(UserError, match=message):
        Placement(np.array(rows, np.int32), 4)
