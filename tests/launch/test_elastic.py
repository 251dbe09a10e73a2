"""A run that loses processes and gets them back: which mesh it takes, and what is said."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore

from moe_jax.checkpoint.steps import saved_steps
from moe_jax.config.load import load_config
from moe_jax.config.schema import MeshConfig
from moe_jax.launch import processes
from moe_jax.launch.elastic import Elastic, smaller_meshes
from moe_jax.launch.processes import Job, supervise
from moe_jax.placement.table import EMPTY, Placement, contiguous
from moe_jax.tracking.status.gather import gather_status
from tests.support import ROOT
from tests.support.launching import launched_arguments
from tests.support.started import set_options, start, wait_for_step
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
    job = wide.on_fewer(wide.full, 1)
    assert job is not None and job.processes == 2 and job.mesh == "data=2,expert=2"
    assert job.command == (
        *("train", TINY, "--resume", "--fallback", "--set", "mesh.data=2"),
        *("--set", "mesh.expert=2", "--set", "devices.simulate=4"),
    )
    again = wide.on_fewer(job, 1)
    assert again is not None and (again.processes, again.mesh) == (1, "data=2")
    assert wide.on_fewer(again, 1) is None
    assert wide.again_in_full() == wide.full.again() and wide.full.mesh is None
    narrow = elastic("model.width=48", "train.global_batch=24", processes=4)
    job = narrow.on_fewer(narrow.full, 1)
    assert job is not None and (job.processes, job.mesh) == (3, "data=2,expert=3")
    job = narrow.on_fewer(narrow.full, 2)  # two died
    assert job is not None and (job.processes, job.mesh) == (2, "data=2,expert=2")


def test_what_only_a_start_would_refuse_does_not_fit(tmp_path):
    """A topology is for one number of devices, a table for one expert axis."""
    topology = ROOT / "configs" / "placement" / "topology.yaml"
    job = elastic(f"placement.topology={topology}", processes=4)
    assert job.on_fewer(job.full, 1) is None
    table = tmp_path / "table.json"
    table.write_text(json.dumps(contiguous(4, 8, 4).to_json()))
    custom = "placement.strategy=custom", f"placement.file={table}"
    job = elastic(*custom, processes=4)
    fewer = job.on_fewer(job.full, 1)
    assert fewer is not None and (fewer.processes, fewer.mesh) == (2, "expert=4")
    # One device each: four processes could form expert=2, tensor=2, but not share six rows.
    settings = "mesh.data=1", "mesh.expert=3", "mesh.tensor=2", "devices.simulate=6"
    job = elastic(*settings, "model.width=48", "train.global_batch=6", processes=6)
    fewer = job.on_fewer(job.full, 1)
    assert fewer is not None and (fewer.processes, fewer.mesh) == (2, "tensor=2")


class ToOne:
    """Shrinks to one process, whatever dies."""

    def __init__(self, full: Job):
        self.full = full
        self.lost: list[int] = []

    def on_fewer(self, job: Job, lost: int) -> Job | None:
        self.lost.append(lost)
        return dataclasses.replace(job, processes=1, mesh="expert=1") if job.processes > 1 else None

    def again_in_full(self) -> Job:
        return self.full


class GrowsAtOnce(ToOne):
    """The signal to grow comes while `launch` waits before the restart."""

    def on_fewer(self, job: Job, lost: int) -> Job | None:
        os.kill(os.getpid(), signal.SIGUSR2)
        return super().on_fewer(job, lost)


def run(folder: Path, shrinking: ToOne, *starts: list[str]) -> tuple[int, list[int]]:
    """The exit code of a launch whose n-th start has the n-th scripts, and how many processes each
    start had.
    """
    scripts, counts, now = iter(starts), [], []

    def arguments(job: Job, process: int, port: int) -> list[str]:
        if process == 0:
            counts.append(job.processes)
            now[:] = next(scripts)
        return launched_arguments(folder, process, now[process])

    code = supervise(
        shrinking.full, max_restarts=1, wait=0.01, arguments_of=arguments, elastic=shrinking
    )
    return code, counts


def test_after_a_death_fewer_go_on_until_all_are_told_to(tmp_path, capfd):
    """The signal comes from the process that goes on alone; `launch` ends it as SIGTERM does. Where
    it has not begun to train it saves nothing, which is no further death.
    """
    dies, ends = ["kill=9", "await=never"], ["out=a", "make=b"]
    for number, grows in enumerate(("grow;await=saved_0", "grow;await=saved_0;exit=143")):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert run(folder, ToOne(Job(("train",), 2)), dies, [grows], ends) == (0, [2, 1, 2])
        assert (folder / "saved_0").exists() and (folder / "b").exists()
        out, err = capfd.readouterr()
        assert out == "a\n" and err.count("process 0 of") == 1
        assert (
            f"from the beginning, with 1 of the 2 processes on the mesh expert=1; all again: "
            f"kill -USR2 {os.getpid()}.\n" in err
        )
        assert "going on with all 2 processes." in err


def test_all_may_be_told_to_before_the_restart(tmp_path, capfd):
    shrinking = GrowsAtOnce(Job(("train",), 2))
    starts = ["kill=9", "await=never"], ["out=a", "out=b"]
    assert run(tmp_path, shrinking, *starts) == (0, [2, 2])
    assert "going on with all 2 processes." in capfd.readouterr().err


def test_a_stop_after_the_signal_to_grow_stops(tmp_path, capfd):
    shrinking = ToOne(Job(("train",), 2))
    starts = ["kill=9", "await=never"], ["grow;await=saved_0;stop"]
    assert run(tmp_path, shrinking, *starts) == (0, [2, 1])
    assert "going on with all" not in capfd.readouterr().err


def test_those_that_died_by_themselves_are_left_out(tmp_path, capfd, monkeypatch):
    """Not those that ended because of them; if all died, all are tried again."""
    monkeypatch.setattr(processes, "TOGETHER", 60.0)  # so that all have ended
    shrinking = ToOne(Job(("train",), 3))
    assert run(tmp_path, shrinking, ["kill=9", "exit=69", "kill=9"], ["out=a"]) == (0, [3, 1])
    assert shrinking.lost == [2]
    shrinking = ToOne(Job(("train",), 2))
    assert run(tmp_path, shrinking, ["kill=9", "kill=9"], ["out=a", "out=b"]) == (0, [2, 2])
    assert "with all 2 again, because none of them is left." in capfd.readouterr().err


def test_where_no_mesh_fits_all_are_started_again(tmp_path, capfd):
    class Never(ToOne):
        def on_fewer(self, job: Job, lost: int) -> Job | None:
            return None

    starts = ["kill=9", "await=never"], ["out=done", "out=x"]
    assert run(tmp_path, Never(Job(("train",), 2)), *starts) == (0, [2, 2])
    assert "with 2 again, because no smaller mesh fits the run." in capfd.readouterr().err


WEIGHTS = "params/stacks/0/blocks/0/mlp/experts/down"
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
    "checkpoint.every": 3,
    "checkpoint.keep_last": 9,
    "mesh.data": 1,
    "mesh.expert": 8,
    "devices.simulate": 0,
    "placement.strategy": "balanced",
    "placement.redundant_slots": 1,
    "placement.replan_every": 4,
}


def start_run(run_dir: Path, *launch: str, **changes: object) -> subprocess.Popen[str]:
    command = ("train", TINY, *set_options(SETTINGS | changes), "--run-dir", run_dir)
    return start(*launch, *command, stderr=subprocess.STDOUT)


def saved_meta(run_dir: Path, step: int) -> dict[str, Any]:
    text = (run_dir / "checkpoints" / f"step_{step:08d}" / "meta.json").read_text()
    meta: dict[str, Any] = json.loads(text)
    return meta


def busiest(table: Placement, load_E: np.ndarray) -> float:
    """The load of the busiest rank, replicas having equal parts; one layer."""
    load = load_E / table.replica_count()[0]
    experts_RS = table.by_rank[0]
    return float(np.where(experts_RS == EMPTY, 0.0, load[experts_RS]).sum(-1).max())


def check_placed(run_dir: Path, before: int, step: int, line: dict[str, Any]) -> None:
    """The checkpoint `step` is the first on its mesh; `before` is the one that the run went on
    from, whose load its experts were placed by. `line` is the step's training line.
    """
    table = Placement.from_json(saved_meta(run_dir, step)["placement"])
    experts_P = table.physical_to_logical[0]
    assert set(experts_P.tolist()) - {EMPTY} == set(range(8))
    windows = saved_meta(run_dir, before)["replanning"]
    longest = max(
        windows["window"], windows["before"] or windows["window"], key=lambda w: w["steps"]
    )
    load_E = np.sum(longest["traffic_LRE"][0], axis=0)
    assert load_E.sum() > 0
    assert busiest(table, load_E) < busiest(contiguous(1, 8, table.ranks, 1), load_E)
    # Tokens went to the slots that the table gives their experts, and to no other.
    layer = line["layers"][0]
    found_E = np.zeros(8)
    np.add.at(
        found_E, experts_P[experts_P != EMPTY], np.array(layer["slot_load"])[experts_P != EMPTY]
    )
    assert found_E.tolist() == layer["load"] and sum(layer["load"]) == 24 * 32 * 2
    assert len(layer["device_load"]) == table.ranks


def stored_experts(run_dir: Path, step: int) -> np.ndarray:
    """The experts' second matrices in a checkpoint, in logical order; replicas must be equal."""
    place = run_dir / "checkpoints" / f"step_{step:08d}" / "state"
    index = {"driver": "ocdbt", "base": f"file://{place}/", "path": WEIGHTS}
    stored = tensorstore.open({"driver": "zarr", "kvstore": index}, read=True).result()
    slots = stored.read().result()[0]
    table = Placement.from_json(saved_meta(run_dir, step)["placement"])
    for expert in range(8):
        first, *others = slots[table.slots_of(0, expert)]
        assert all((other == first).all() for other in others)
    return np.array([slots[table.slots_of(0, expert)[0]] for expert in range(8)])


@pytest.mark.slow
def test_from_four_processes_to_three_and_back(tmp_path: Path) -> None:
    """8 devices, 6 and 8 again; every loss is that of one process that nothing happened to."""
    quiet, shaken = tmp_path / "quiet", tmp_path / "shaken"
    process = start_run(quiet, **{"devices.simulate": 8})
    assert process.wait(400) == 0, process.communicate()[0]
    process = start_run(shaken, "launch", "-n", "4", "--elastic", "--")
    wait_for_step(process, shaken, 7)
    told = json.loads((shaken / "processes" / "process_2.json").read_text())
    os.kill(told["pid"], signal.SIGKILL)
    wait_for_step(process, shaken, 10)
    status = gather_status(shaken, time.time())
    process.send_signal(signal.SIGUSR2)
    out = process.communicate(timeout=400)[0]
    assert process.returncode == 0, out
    assert "process 2 of 4 was killed by SIGKILL" in out
    assert "with 3 of the 4 processes on the mesh expert=6" in out
    assert "going on with all 4 processes" in out
    assert status["mesh"] == {"data": 1, "expert": 6, "tensor": 1} and status["restarts"] == 1
    assert [one["state"] for one in status["processes"]] == 3 * ["live"]
    assert status["experts"]["slots_per_rank"] == 3
    status = gather_status(shaken, time.time())
    assert status["mesh"]["expert"] == 8 and len(status["processes"]) == 4
    assert status["state"] == "ended" and status["restarts"] == 2
    found, expected = training_lines(shaken), training_lines(quiet)
    assert [line["step"] for line in found] == list(range(1, 19))
    for left, right in zip(found, expected, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["kept"] == right["kept"]
    steps = saved_steps(shaken / "checkpoints")
    ranks = [saved_meta(shaken, step)["placement"]["ranks"] for step in steps]
    assert [number for number, _ in itertools.groupby(ranks)] == [8, 6, 8]
    for before, step in itertools.pairwise(range(len(steps))):
        if ranks[before] != ranks[step]:
            check_placed(shaken, steps[before], steps[step], found[steps[step] - 1])
    assert saved_meta(shaken, 18)["data"] == saved_meta(quiet, 18)["data"]
    np.testing.assert_allclose(stored_experts(shaken, 18), stored_experts(quiet, 18), atol=1e-4)
