"""`moe-jax status`: what it tells of a run in training, one that was killed, one of an earlier
version; and what is no run.
"""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from moe_jax.tracking.phases import Phases
from moe_jax.tracking.status.gather import gather_status, process_load, slow_process
from moe_jax.tracking.status.table import draw_status
from tests.support import monitored_run
from tests.support.command import call
from tests.tracking.test_watch import begin


def told(process: int, **rest: object) -> dict:
    said = {"process": process, "processes": 2, "host": "far", "pid": 1, "attempt": 0.0}
    said |= {"from_step": 0, "step": 11, "phase": "step", "since": 60.0, "beat": 60.0}
    said |= {"seconds": {"start": 40.0, "data": 1.0, "step": 19.0}, "step_seconds": 2.0}
    return said | {"ended": False} | rest


def write(run_dir: Path, *processes: dict) -> None:
    (run_dir / "processes").mkdir(exist_ok=True)
    for said in processes:
        path = run_dir / "processes" / f"process_{said['process']}.json"
        path.write_text(json.dumps(said))


def text(status: dict) -> list[str]:
    console = Console(file=StringIO(), width=80)
    console.print(draw_status(status))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_run_of_two_processes_is_told_in_80_columns(tmp_path: Path) -> None:
    run = begin(tmp_path / "mine", monitored_run.whole_run())
    write(run, told(0), told(1, host="another-host.with.a.long.name.example.org", beat=40.0))
    saved = run / "checkpoints" / "step_00000006"
    saved.mkdir(parents=True)
    (saved / "meta.json").write_text(json.dumps({"placement": monitored_run.TABLE.to_json()}))
    os.utime(saved, (30.0, 30.0))
    status = gather_status(run, 63.0)
    assert [process["state"] for process in status["processes"]] == ["live", "silent"]
    assert status["state"] == "running, but not all of it" and status["step"] == 10
    assert status["experts"]["slots"] == 6 and status["experts"]["slots_per_rank"] == 6
    group = status["experts"]["groups"][0]
    assert group["layers"] == [0] and group["load_max_over_mean"] == 1.6 and group["dropped"] == 5
    assert status["checkpoint"]["step"] == 6 and status["checkpoint"]["age"] == 33.0
    assert status["goodput"]["wall"] == 60.0 and status["goodput"]["productive"] == 19.0
    lines = text(status)
    assert max(map(len, lines)) <= 80
    page = "\n".join(lines)
    assert "checkpoint of step 6, 33 s old  restarts: 0" in page
    assert "rank 0: experts 0-2" in page and "goodput 31.7% of 1 min 0 s" in page


def test_layers_are_told_in_at_most_eight_groups(tmp_path: Path) -> None:
    layer = monitored_run.training(1)["layers"][0]
    line = monitored_run.training(1, layers=[{**layer, "layer": index} for index in range(48)])
    groups = gather_status(begin(tmp_path / "deep", [line]), 0.0)["experts"]["groups"]
    assert [len(group["layers"]) for group in groups] == [6] * 8
    assert groups[1]["layers"] == [6, 7, 8, 9, 10, 11] and groups[1]["dropped"] == 30


def test_a_slow_process_is_named_with_the_reason() -> None:
    uneven = [monitored_run.training(1)]  # 45 on the first two devices, 50 on the others, twice
    assert process_load(uneven, 2).tolist() == [90.0, 100.0]  # type: ignore[union-attr]
    assert process_load(uneven, 3) is None and process_load([], 2) is None
    # On 8 devices before; they cannot be added to the 4 of now.
    before = [monitored_run.training(1, layers=[{"device_load": [7] * 8}]), *uneven]
    assert process_load(before, 2).tolist() == [90.0, 100.0]  # type: ignore[union-attr]
    slow = told(1, seconds={"data": 6.0, "step": 14.0})
    found = slow_process([told(0), slow], uneven)
    assert found == {
        "process": 1,
        "text": "process 1 by itself: it takes 0.5 s per step longer for its batch",
    }
    layer = {**uneven[0]["layers"][0], "device_load": [60, 60, 20, 20]}
    found = slow_process([told(0), told(1)], [monitored_run.training(1, layers=[layer])])
    assert found == {"process": 0, "text": "process 0 by load: its experts have 1.50 x the mean"}
    unknown = slow_process([told(0), told(1)], uneven)
    assert unknown is not None and unknown["process"] is None
    assert slow_process([told(0, processes=1)], uneven) is None


def test_a_run_of_an_earlier_version_and_one_that_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = begin(tmp_path / "old", monitored_run.whole_run())
    assert call("status", old) == 0
    out = capsys.readouterr().out
    assert out.startswith("old  unknown  step 6/6") and "an earlier version trained it" in out
    with Phases(tmp_path / "new"):
        assert call("status", tmp_path / "new", "--json") == 0
        status = json.loads(capsys.readouterr().out)
    assert status["state"] == "running" and status["processes"][0]["phase"] == "start"


@pytest.mark.parametrize("command", ["status", "watch"])
def test_what_is_no_run_gets_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    for name, why in (
        ("file", "is a file"),
        ("other", "is not a run directory"),
        ("none", "does not exist"),
    ):
        assert call(command, tmp_path / name) == 2
        error = capsys.readouterr().err
        assert why in error and error.count("\n") == 1
