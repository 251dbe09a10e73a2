"""A run that loses processes and gets them back: which mesh it takes, and what is said."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_jax.config.load import load_config
from moe_jax.config.schema import MeshConfig
from moe_jax.launch.elastic import Elastic, smaller_meshes
from moe_jax.launch.processes import Job, supervise
from tests.support import ROOT
from tests.support.launching import launched_arguments
from tests.support.tiny_run import training_lines

TINY = str(ROOT / "configs" / "tiny.yaml")


def axes(mesh: MeshConfig) -> tuple[int, int, int]:
    return mesh.data, mesh.expert, mesh.tensor


def test_the_data_axis_stays_where_it_can_and_the_expert_axis_changes_least():
    found = [axes(mesh) for mesh in smaller_meshes(MeshConfig(data=2, expert=4), 6)]
    assert found == [(2, 3, 1), (1, 6, 1), (3, 2, 1), (6, 1, 1)]
    found = [axes(mesh) for mesh in smaller_meshes(MeshConfig(data=1, expert=4, tensor=2), 6)]
    assert found == [(1, 3, 2), (3, 1, 2)]
    assert not list(smaller_meshes(MeshConfig(expert=4, tensor=2), 3))


def elastic(*settings: str, processes: int) -> Elastic:
    job = Job(("train", TINY, *[word for text in settings for word in ("--set", text)]), processes)
    return Elastic(job, TINY, settings, load_config(Path(TINY), settings).mesh, True)


def test_the_configuration_says_which_mesh_fits():
    """A width of 128 and 32 sequences are not for 6 devices; 48 and 24 are."""
    wide = elastic(processes=4)
    job = wide.on_fewer(wide.full)
    assert job is not None and job.processes == 2 and job.mesh == "data=2,expert=2"
    assert job.command == (
        *("train", TINY, "--resume", "--fallback", "--set", "mesh.data=2"),
        *("--set", "mesh.expert=2", "--set", "devices.simulate=4"),
    )
    again = wide.on_fewer(job)
    assert again is not None and (again.processes, again.mesh) == (1, "data=2")
    assert wide.on_fewer(again) is None
    assert wide.again_in_full() == wide.full.again() and wide.full.mesh is None
    narrow = elastic("model.width=48", "train.global_batch=24", processes=4)
    job = narrow.on_fewer(narrow.full)
    assert job is not None and (job.processes, job.mesh) == (3, "data=2,expert=3")


class Halves:
    """Shrinks to one process, which is what it is told to do."""

    def __init__(self, full: Job):
        self.full = full

    def on_fewer(self, job: Job) -> Job | None:
        if job.processes == 1:
            return None
        return dataclasses.replace(job, processes=1, mesh="expert=1")

    def again_in_full(self) -> Job:
        return self.full


def test_after_a_death_fewer_go_on_until_all_are_told_to(tmp_path, capfd):
    """The signal comes from the process that goes on alone; `launch` ends it as SIGTERM does."""
    scripts = iter([["kill=9", "await=never"], ["grow;await=saved_0"], ["out=a", "make=b"]])
    counts, now = [], []

    def arguments(job: Job, process: int, port: int) -> list[str]:
        if process == 0:
            counts.append(job.processes)
            now[:] = next(scripts)
        return launched_arguments(tmp_path, process, now[process])

    full = Job(("train",), 2)
    assert (
        supervise(full, max_restarts=1, wait=0.01, arguments_of=arguments, elastic=Halves(full))
        == 0
    )
    assert counts == [2, 1, 2] and (tmp_path / "saved_0").exists() and (tmp_path / "b").exists()
    out, err = capfd.readouterr()
    assert out == "a\n"
    assert (
        f"from the beginning, with 1 of the 2 processes on the mesh expert=1; all again: "
        f"kill -USR2 {os.getpid()}.\n" in err
    )
    assert "going on with all 2 processes." in err


def test_where_no_mesh_fits_all_are_started_again(tmp_path, capfd):
    scripts = iter([["kill=9"], ["out=done"]])
    full = Job(("train",), 1)

    def arguments(job: Job, process: int, port: int) -> list[str]:
        return launched_arguments(tmp_path, process, next(scripts)[process])

    shrinking = Halves(full)
    assert (
        supervise(full, max_restarts=1, wait=0.01, arguments_of=arguments, elastic=shrinking) == 0
    )
    assert "with 1 again, because no smaller mesh fits the run." in capfd.readouterr().err


SETTINGS = {
    "model.num_layers": 1,
    "model.width": 48,
    "moe.hidden": 48,
    "moe.dropless": "true",
    "moe.bias_rate": 0.01,
    "train.global_batch": 24,
    "train.seq_len": 32,
    "train.steps": 18,
    "train.log_every": 1,
    "train.eval_every": 9,
    "train.eval_batches": 1,
    "train.sample_prompt": "''",
    "checkpoint.every": 4,
    "mesh.data": 1,
    "mesh.expert": 8,
    "devices.simulate": 0,
    "placement.strategy": "balanced",
    "placement.redundant_slots": 1,
    "placement.replan_every": 4,
}


def start(run_dir: Path, *launch: str, **changes: object) -> subprocess.Popen[str]:
    settings = [
        word for key, value in (SETTINGS | changes).items() for word in ("--set", f"{key}={value}")
    ]
    command = ("train", TINY, *settings, "--run-dir", str(run_dir))
    return subprocess.Popen(
        [sys.executable, "-m", "moe_jax", *launch, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    metrics, end = run_dir / "metrics.jsonl", time.monotonic() + 400
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_from_four_processes_to_three_and_back(tmp_path: Path) -> None:
    """8 devices, 6 and 8 again; every loss is that of one process that nothing happened to."""
    quiet, shaken = tmp_path / "quiet", tmp_path / "shaken"
    process = start(quiet, **{"devices.simulate": 8})
    assert process.wait(400) == 0, process.communicate()[0]
    process = start(shaken, "launch", "-n", "4", "--elastic", "--")
    wait_for(process, shaken, 6)
    told = json.loads((shaken / "processes" / "process_2.json").read_text())
    os.kill(told["pid"], signal.SIGKILL)
    wait_for(process, shaken, 10)
    environment = json.loads((shaken / "environment.json").read_text())
    assert environment["mesh"] == {"data": 1, "expert": 6, "tensor": 1}
    assert len(list((shaken / "processes").glob("*.json"))) == 3
    process.send_signal(signal.SIGUSR2)
    out = process.communicate(timeout=400)[0]
    assert process.returncode == 0, out
    assert "process 2 of 4 was killed by SIGKILL" in out
    assert "with 3 of the 4 processes on the mesh expert=6" in out
    assert "going on with all 4 processes" in out
    found, expected = training_lines(shaken), training_lines(quiet)
    assert [line["step"] for line in found] == list(range(1, 19))
    for left, right in zip(found, expected, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["kept"] == right["kept"]
