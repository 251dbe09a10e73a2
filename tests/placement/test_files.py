"""Files that hold no placement table, each refused in one sentence that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_jax.errors import UserError
from moe_jax.placement.files import read_table
from moe_jax.placement.table import contiguous

FORM = contiguous(2, 4, 2).to_json()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "holds no JSON object"),
        (json.dumps(FORM | {"version": 7}).encode(), "version 7"),
        (json.dumps(FORM | {"physical_to_logical": [[0, 1, 2, 2]] * 2}).encode(), "expert 3"),
        (json.dumps(FORM | {"physical_to_logical": [[0, 1], [2]]}).encode(), "whole numbers"),
        (json.dumps(FORM | {"physical_to_logical": [[0, 1, 2, 2**40]]}).encode(), "whole numbers"),
    ],
    ids=range(8),
)
def test_what_is_no_table_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}.*{words}") as refused:
        read_table(path)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_read_says_what_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; give a placement table\.$"):
        read_table(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match=r"cannot be read: Is a directory; give a placement table"):
        read_table(tmp_path)


def test_a_table_for_another_model_or_mesh_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(FORM))
    assert read_table(path, layers=2, num_experts=4, ranks=2).to_json() == FORM
    for wanted, words in (
        ({"layers": 3}, "2 layers, but 3 are needed"),
        ({"num_experts": 5}, "4 experts, but 5 are needed"),
        ({"ranks": 4}, "2 devices, but 4 are needed"),
    ):
        with pytest.raises(UserError, match=words):
            read_table(path, **wanted)
    assert read_table(path, max_experts_per_device=2).num_slots == 4
    with pytest.raises(UserError, match=r"puts 2 experts on device 0.*move expert 1 to another"):
        read_table(path, max_experts_per_device=1)
