"""A file or a folder is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_jax.errors import UserError
from moe_jax.utils.files import new_folder, replace_bytes, replace_text


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "config.yaml"
    replace_text(path, "first\n", durable=durable)
    replace_bytes(path, "zweite Fassung: ä\r\n".encode(), durable=durable)
    assert path.read_bytes() == "zweite Fassung: ä\r\n".encode()
    assert [other.name for other in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_appears_when_its_block_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    (tmp_path / "deep" / "out.part").mkdir(parents=True)
    (tmp_path / "deep" / "out.part" / "left").write_text("by one that was killed")
    with new_folder(out) as part:
        (part / "whole").write_text("")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(UserError, match="exists already"), new_folder(out):
        pytest.fail("what is there must not be written over")


def test_nothing_is_left_of_a_folder_whose_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as part:
        (part / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
