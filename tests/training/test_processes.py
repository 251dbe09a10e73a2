"""A run over several real processes, which share one mesh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.command import run_module
from tests.support.started import set_options
from tests.support.tiny_run import training_lines

SETTINGS = {
    "model.num_layers": 1,
    "model.width": 32,
    "model.hidden": 32,
    "moe.hidden": 32,
    "train.global_batch": 8,
    "train.seq_len": 32,
    "train.log_every": 1,
    "train.eval_every": 1000,
    "train.eval_batches": 1,
    "train.sample_prompt": "",
    "checkpoint.every": 1000,
}
KINDS = {
    "dropless": {"moe.dropless": "true", "train.steps": 40},
    "capacity": {"moe.capacity_factor": 0.75, "train.steps": 2},
}
COUNTS = {"dropless": (1, 2, 4), "capacity": (1, 4)}  # each process compiles, which takes long


def case(kind: str, count: int, folder: Path) -> dict[str, Any]:
    """For `tests.support.joined`: a run of `count` processes, its metrics in a folder."""
    settings = set_options(SETTINGS | KINDS[kind])
    run = str(folder / f"{kind}_{count}")
    words = ["train", str(ROOT / "configs" / "tiny.yaml"), *settings, "--run-dir", run]
    return {"commands": dict.fromkeys(range(count), words), "processes": count, "limit": 400}


@pytest.mark.slow
def test_the_number_of_processes_does_not_change_the_losses(tmp_path: Path) -> None:
    """1, 2 and 4 over the same 8 devices, data=2 and expert=4; for 4 the drops too.

    Quicker tests compare one process's meshes (tests/test_invariants.py).
    """
    cases = {
        f"{kind}_{count}": case(kind, count, tmp_path) for kind in KINDS for count in COUNTS[kind]
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = run_module("joined", tmp_path / "cases.json", timeout=900)
    assert done.returncode == 0, done.stderr
    for name, ended in json.loads(done.stdout).items():
        assert set(ended["codes"].values()) == {0}, (name, ended)
    for kind in KINDS:
        alone = training_lines(tmp_path / f"{kind}_1")
        assert len(alone) == KINDS[kind]["train.steps"]
        for count in COUNTS[kind][1:]:
            lines = training_lines(tmp_path / f"{kind}_{count}")
            assert [line["step"] for line in lines] == [line["step"] for line in alone]
            for left, right in zip(lines, alone, strict=True):
                close = 1e-6 if left["step"] <= 5 else 1e-3
                assert left["loss"] == pytest.approx(right["loss"], rel=close)
            for key in ("load", "dropped_to", "device_load"):
                assert lines[0]["layers"][0][key] == alone[0]["layers"][0][key]
            assert (lines[0]["dropped"] > 0) == (kind == "capacity")
