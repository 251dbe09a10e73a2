"""Comparisons with another library: turns, ratios, and what is said where it cannot run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_jax.benchmarks import against, training
from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from tests.benchmarks.test_placement import options
from tests.support import ROOT


def test_the_ratio_is_the_median_of_the_turns(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the third turn here, in which the machine was slow: not the ratio of the medians."""
    order, speeds = [], {"ours": [10.0, 30.0, 4.0], "theirs": [10.0, 10.0, 2.0]}

    def side(name: str):
        def measure() -> against.Figures:
            order.append(name)
            rate = speeds[name][order.count(name) - 1]
            return {"decode_tokens_per_second": rate, "peak_bytes": int(rate), "version": "5"}

        return measure

    rates = ("decode_tokens_per_second",)
    own, compared = against.in_turns(3, side("ours"), side("theirs"), rates, "transformers")
    assert order == ["ours", "theirs"] * 3 and [turn[rates[0]] for turn in own] == speeds["ours"]
    assert compared == {
        "transformers_decode_tokens_per_second": 10.0,
        "decode_over_transformers": 2.0,
        "transformers_peak_bytes": 10,
        "transformers_version": "5",
    }
    assert "turn 3: decode_tokens 2.0/s  (transformers)" in capsys.readouterr().out


def fake_python(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def compared_with(*named: str, python: str | None = None, **changes: Any) -> argparse.Namespace:
    return options(against=list(named), python=python, maxtext_option=None, **changes)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder that looks like MaxText's source."""
    folder = tmp_path / "maxtext"
    trainer = folder / against.TRAINER
    trainer.parent.mkdir(parents=True)
    trainer.touch()
    return folder


@pytest.mark.parametrize("name", ["transformers", "maxtext"])
def test_a_turn_is_a_process_that_is_told_the_shape(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And, of MaxText, the mesh and the folder, but not how many threads are ours."""
    monkeypatch.setenv("NPROC", "24")
    script = f'echo "$1 $2 $4 $NPROC" > {tmp_path}/what; echo noise; echo "$3"'
    maxtext = name == "maxtext"
    named = (name, str(source)) if maxtext else (name,)
    mesh = {"data": 2, "expert": 4, "tensor": 1} if maxtext else {}
    asked = compared_with(*named, python=fake_python(tmp_path, script), **mesh)
    told = against.Library(asked, "train", 8 if maxtext else 1).turn()
    assert (told["experts"], told["seq"], told["warmup"], told["untied"]) == (8, 64, 1, False)
    assert ("expert" in told, "prompt" in told) == (maxtext, False)
    ran = (tmp_path / "what").read_text().split()
    folder = [str(source)] if maxtext else []
    assert ran == [str(ROOT / f"scripts/benchmark_{name}.py"), "train", *folder]


def test_maxtext_is_told_the_same_run() -> None:
    """Its keys are checked where MaxText itself runs; here the values that depend on options."""
    script = runpy.run_path(str(ROOT / "scripts/benchmark_maxtext.py"))
    asked = vars(options(data=2, expert=4, tensor=1, maxtext_option=["megablox=true", "a=b=c"]))
    found = script["settings"](asked, "/out")
    assert found["per_device_batch_size"] == 1 and found["steps"] == asked["warmup"] + 3
    assert found["capacity_factor"] == 1.0 and found["logits_via_embedding"]
    assert (found["megablox"], found["a"]) == ("true", "b=c")
    assert script["settings"](asked | {"dropless": True}, "/out")["capacity_factor"] == -1


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo 'No module named torch' >&2; exit 1", "No module named torch"), (None, "No such file")],
)
def test_a_python_without_transformers_is_one_sentence(
    script: str | None, said: str, tmp_path: Path
) -> None:
    python = str(tmp_path / "none") if script is None else fake_python(tmp_path, script)
    asked = compared_with("transformers", python=python)
    with pytest.raises(UserError, match=rf"--python {python} cannot .*{said}.*: name a Python"):
        against.Library(asked, "train", 1).turn()


def test_several_devices_are_not_compared() -> None:
    asked = compared_with("transformers")
    with pytest.raises(UserError, match="--against transformers runs on one device and the mesh"):
        training.benchmark_training(asked, MeshConfig(expert=4))


@pytest.mark.parametrize(
    ("what", "named", "said"),
    [
        ("train", ["torchtitan"], "train is compared with transformers, or maxtext and the folder"),
        ("train", ["transformers", "more"], "train is compared with transformers"),
        ("train", ["maxtext"], "name one folder"),
        ("train", ["maxtext", "a", "b"], "name one folder"),
        ("train", ["maxtext", "nowhere"], "nowhere is not MaxText, because it has no src/maxtext/"),
        ("generate", ["maxtext", "nowhere"], r"generate is compared with transformers\.$"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(what: str, named: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"--against {' '.join(named)}: {said}"):
        against.Library(compared_with(*named), what, 1)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_training_beside_transformers(tmp_path: Path) -> None:
    sizes = "--layers 1 --width 32 --heads 2 --kv-heads 1 --head-dim 16 --experts 4 --vocab 64"
    run = "--expert-hidden 16 --top-k 2 --batch 2 --seq 16 --steps 1 --warmup 1 --turns 1"
    out = tmp_path / "figures.json"
    options = [*sizes.split(), *run.split(), "--against", "transformers", "--json", str(out)]
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "train", *options]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    figures = json.loads(out.read_text())
    ratio = figures["tokens_per_second"] / figures["transformers_tokens_per_second"]
    assert figures["tokens_over_transformers"] == pytest.approx(ratio)
