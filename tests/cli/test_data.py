"""`moe-jax data`: prepare and verify, and the sentence for each mistake."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from moe_jax.cli import main
from moe_jax.data import prepare as job


def call(*arguments: object) -> int:
    """Exit code of `moe-jax data ARGUMENTS`."""
    with pytest.raises(SystemExit) as caught:
        main.main(["data", *map(str, arguments)])
    return caught.value.code


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    lines = (json.dumps({"text": f"some words {i}", "body": "x", "id": i}) for i in range(50))
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return tmp_path / "texts.jsonl"


def test_prepare_and_verify(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call("prepare", texts, out, "--tokenizer", "bytes", "--workers", 1) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"690 tokens of 50 documents in {out}, in ")
    assert said.endswith(f"--set data.source={out} --set data.tokenizer=bytes\n")
    assert call("verify", out) == 0
    assert capsys.readouterr().out.startswith(f"{out} is whole: ")
    file = out / "00000.tokens.npy"
    tokens = np.load(file)
    tokens[5] ^= 1
    np.save(file, tokens)
    assert call("verify", out) == 2
    assert capsys.readouterr().err.startswith(f"moe-jax: {file} is damaged (its hash is another):")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "out", "--tokenizer", "bytes"], "SOURCE='nowhere' does not exist"),
        (["texts.jsonl", "out", "--tokenizer", "no.json"], "--tokenizer='no.json' does not exist"),
        (["texts.jsonl", ".", "--tokenizer", "bytes"], "exists already: name another folder"),
        (["texts.jsonl", "out", "--tokenizer", "bytes", "--loss-on", "x"], "--loss-on 'x' is unkn"),
        (
            ["texts.jsonl", "out", "--tokenizer", "bytes", "--text-field", "id", "--workers", "1"],
            "--text-field='id' is not text in line 1 of",
        ),
        (
            ["texts.jsonl", "out", "--tokenizer", "bytes", "--validation-fraction", "0.9"],
            "--validation-fraction=0.9 is out of range",
        ),
        (["texts.jsonl", "out", "--tokenizer", "bytes", "--workers", "0"], "--workers"),
        (["texts.jsonl", "s3://bucket/out", "--tokenizer", "bytes"], "is a URL"),
    ],
)
def test_mistakes(
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(texts.parent)
    assert call("prepare", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not Path("out").exists()


def test_verify_wants_a_prepared_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", tmp_path) == 2
    assert "is no folder that moe-jax data prepare wrote" in capsys.readouterr().err


def test_a_full_disk_is_said_and_gone_on_after(
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(folder: Path, *rest: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "00000.tokens.npy"))

    command = ["prepare", texts, tmp_path / "out", "--tokenizer", "bytes", "--workers", 1]
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_shard", full)
        assert call(*command) == 2
    assert "out.part/00000.tokens.npy: no space is left on its disk" in capsys.readouterr().err
    assert call(*command) == 0
