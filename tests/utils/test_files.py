"""Paths as they are typed; a file or a folder is written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moe_jax.errors import UserError
from moe_jax.utils.files import local_path, new_folder, replace_bytes, replace_text


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert (
        local_path("~/runs/first")
        == local_path(Path("~/runs/first"))
        == Path("/home/me/runs/first")
    )
    assert [local_path(plain) for plain in ("a/~b", "./~", "")] == [Path("a/~b"), Path("~"), Path()]
    with pytest.raises(UserError, match=r"^~nobody-here/x: there is no such home folder"):
        local_path("~nobody-here/x")


@pytest.mark.parametrize(
    "url", ["gs://bucket/run", "s3://bucket", "file:///runs", "https://a.b/c", "hf://org/name"]
)
def test_urls_are_no_paths(url: str) -> None:
    """As text, and as the path that a caller made of it."""
    for path in (url, Path(url)):
        with pytest.raises(UserError, match=" is a URL, and only paths of this machine are read"):
            local_path(path)
    assert local_path("C:/runs") == Path("C:/runs") and local_path("a:b/c") == Path("a:b/c")


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


def test_a_folder_appears_where_folders_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File by file, the one by which it is known last."""
    moved, replace = [], os.replace

    def rename(old: Path, new: Path) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented", str(old))

    def note(old: Path, new: Path) -> None:
        moved.append(new.name)
        replace(old, new)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", note)
    with new_folder(tmp_path / "out") as part:
        (part / "config.json").write_text("{}")
        (part / "weights").mkdir()
        (part / "weights" / "config.json").write_text("[]")
    assert moved == ["config.json", "config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert (tmp_path / "out" / "weights" / "config.json").read_text() == "[]"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_of_a_folder_whose_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as part:
        (part / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
