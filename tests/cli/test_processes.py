"""Commands of several processes: real ones on this machine, which share a model or a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from moe_jax.errors import UserError
from moe_jax.runtime.distributed import ProcessGroup, process_count, process_index
from tests.support.hf_folder import make_folder
from tests.support.started import set_options, start, wait_for_step

SMALL = {
    "model.num_layers": 1,
    "model.width": 32,
    "moe.hidden": 32,
    "train.global_batch": 4,
    "train.seq_len": 32,
    "train.eval_batches": 1,
    "train.log_every": 1,
    "checkpoint.every": 100,
    "mesh.data": 1,
    "mesh.expert": 2,
    "devices.simulate": 2,
}


def ended(process: subprocess.Popen[str], typed: str | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = process.communicate(typed, timeout=300)
    return process.returncode, out, err


def children(process: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


@pytest.mark.slow
def test_two_processes_share_a_model(tmp_path: Path) -> None:
    model = make_folder("qwen3_moe-plain", tmp_path / "model")
    talk = ("chat", model, "--max-tokens", 4, "--greedy", "--mesh", "expert=2")
    one = ended(start(*talk), "hello\n/reset\nthere\n")
    two = ended(start("launch", "-n", 2, "--", *talk), "hello\n/reset\nthere\n")
    assert (two[0], two[1]) == (one[0], one[1]) == (0, one[1])
    assert one[1].count("\n") >= 2
    assert two[2].count("The conversation is forgotten.") == 1  # one process speaks


@pytest.mark.slow
def test_a_stopped_run_of_two_processes_has_saved_one_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = set_options(SMALL | {"train.steps": 5000})
    job = ("train", "configs/tiny.yaml", *settings, "--run-dir", run)
    process = start("launch", "-n", 2, "--", *job)
    metrics = run / "metrics.jsonl"
    wait_for_step(process, run, 5)
    follower = max(children(process))
    os.kill(follower, signal.SIGTERM)
    code, out, err = ended(process)
    assert code == 0, err
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    saved = [int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")]
    assert saved == [steps[-1]]
    assert f"Stopped after step {steps[-1]}; saved." in out
    assert out.count("Compiling the training step.") == 1


@pytest.mark.parametrize(
    ("group", "named"),
    [
        (("host:1", 2, None), "--process-id"),
        ((None, 2, 0), "--coordinator"),
        (("host", 2, 0), "HOST:PORT"),
        (("host:1", 2, 2), "--process-id 2"),
    ],
)
def test_an_impossible_group_is_named(
    group: tuple[str | None, int | None, int | None], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        ProcessGroup(*group)


def test_a_process_alone_is_the_first() -> None:
    assert (process_count(), process_index()) == (1, 0)
