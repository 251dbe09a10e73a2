"""Converted folders: bitwise what was opened, on any mesh, with the tokenizer along; and what is
refused.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.inference import convert, packed_checkpoint
from moe_jax.inference.load import open_model
from moe_jax.inference.session import LoadedModel, Session
from tests.support import tiny_run
from tests.support.command import call
from tests.support.hf_folder import make_folder

PROMPT = [[5, 9, 30, 80, 2, 7]]


def to_converted(
    path: Path, out: Path, *, dtype: str | None = None, quantize: str | None = None, group: int = 16
) -> Path:
    convert.convert(
        path, out, dtype=dtype, quantize=quantize, group=group, step=None, fallback=False
    )
    return out


def assert_same(a: LoadedModel, b: LoadedModel) -> None:
    """Weights and tables are bitwise alike, and lie alike."""
    held_a, held_b = ((model.engine.params, model.engine.tables) for model in (a, b))
    for x, y in zip(jax.tree.leaves(held_a), jax.tree.leaves(held_b), strict=True):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert (a.context, a.eos_ids, a.name) == (b.context, b.eos_ids, b.name)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param("qwen3_moe-plain", {}, marks=pytest.mark.slow),
        ("qwen3_moe-plain", {"quantize": "int8"}),
        pytest.param("deepseek_v3-plain", {"dtype": "bfloat16"}, marks=pytest.mark.slow),
        ("gpt_oss-mxfp4", {"quantize": "int4", "group": 16}),
        ("llama-plain", {}),
    ],
)
def test_a_converted_folder_opens_as_the_one_it_was_made_from(
    case: str, options: dict, tmp_path: Path
) -> None:
    folder = make_folder(case, tmp_path / "in")
    out = to_converted(folder, tmp_path / "out", **options)
    for mesh in (MeshConfig(), MeshConfig(expert=2, tensor=2)):
        before, after = open_model(folder, mesh=mesh, **options), open_model(out, mesh=mesh)
        assert_same(before, after)
    if options.get("quantize") == "int8":
        np.testing.assert_array_equal(Session(before).feed(PROMPT), Session(after).feed(PROMPT))
    assert after.tokenizer.encode("é") == [0xC3, 0xA9]
    assert (
        bytes(after.tokenizer.chat.prompt([{"role": "user", "content": "hi"}]))
        == b"user: hi\nassistant:"
    )
    assert not list(tmp_path.rglob("tokenizer/modeling.py"))


def test_experts_that_the_mesh_does_not_divide(tmp_path: Path) -> None:
    folder = make_folder("qwen3_moe-mixed", tmp_path / "in")
    out, mesh = to_converted(folder, tmp_path / "out"), MeshConfig(expert=4)
    assert_same(open_model(folder, mesh=mesh), open_model(out, mesh=mesh))


@pytest.mark.slow
def test_a_run_converts_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run.finished(folder)
    assert call("convert", run, tmp_path / "out", "--step", "3") == 0
    assert "of weights in float32" in capsys.readouterr().err
    loaded = open_model(tmp_path / "out")
    assert_same(open_model(run, step=3), loaded)
    assert loaded.context == 32 and loaded.tokenizer.encode("a") == [97]
    assert json.loads((tmp_path / "out" / "moe_jax.json").read_text())["tokenizer"] == "bytes"


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder("llama-plain", tmp_path / "in")
    out = to_converted(folder, tmp_path / "out", quantize="int8")

    capsys.readouterr()

    def refused(*arguments: object) -> str:
        assert call(*arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("moe-jax: ")
        return err

    assert "exists already" in refused("convert", folder, out)
    assert "converted already" in refused("convert", out, tmp_path / "again")
    assert "does not exist" in refused("convert", tmp_path / "missing", tmp_path / "again")
    assert "--quantize 'int2'" in refused(
        "convert", folder, tmp_path / "again", "--quantize", "int2"
    )
    assert "groups of 48" in refused(
        "convert", folder, tmp_path / "again", "--quantize", "int4", "--group", "48"
    )
    assert "has no config.json" in refused("convert", tmp_path, tmp_path / "again")
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob("*.part"))
    with pytest.raises(UserError, match=r"--dtype bfloat16 but .* was converted to float32"):
        open_model(out, dtype="bfloat16")
    with pytest.raises(UserError, match=r"--quantize int4 but .* was converted to int8"):
        open_model(out, quantize="int4")
    header = out / "moe_jax.json"
    header.write_text(header.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(UserError, match="format 9"):
        open_model(out)
    header.write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        open_model(out)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder("llama-plain", tmp_path / "in")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for patched in ((Checkpoints, "_commit"), (packed_checkpoint, "copy_tokenizer")):
        with (
            monkeypatch.context() as patch,
            pytest.raises((UserError, OSError), match=r"too full|No space"),
        ):
            patch.setattr(*patched, full)
            to_converted(folder, tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"in"}
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"its disk has 10 bytes left"),
    ):
        patch.setattr(
            packed_checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})
        )
        to_converted(folder, tmp_path / "out")
    (tmp_path / "out.part").mkdir()  # left by one that was killed
    to_converted(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_damage_is_found(tmp_path: Path) -> None:
    out = to_converted(make_folder("llama-plain", tmp_path / "in"), tmp_path / "out")
    victim = max(
        (file for file in (out / "weights").rglob("*") if file.is_file()),
        key=lambda file: file.stat().st_size,
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(UserError, match="does not hold the bytes"):
        open_model(out)
