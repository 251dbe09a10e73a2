"""scripts/faults.py: a small part of it with real processes, and the table that it writes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    """The scripts' folder on the path, as where one of them runs."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def faults(scripts: None) -> Any:
    import faults

    return faults


@pytest.mark.slow
def test_three_deaths_leave_the_curve_as_it_is(faults: Any, tmp_path: Path) -> None:
    """A process in a step, another in a save, and the one that hosts the coordinator, one after
    the other in one run. Quicker tests: tests/launch/test_processes.py, tests/checkpoint.
    """
    runs = faults.fault_runs
    bench, outcome = faults.Bench(tmp_path, seed=0, moments=1), faults.Outcome()
    run_dir = bench.new_run()
    assert bench.undisturbed
    with bench.launch(run_dir, restarts=3) as launch:
        for process, phase in ((1, "step"), (1, "save"), (0, "evaluation")):
            outcome.add(runs.kill(launch, run_dir, faults.moment_of(run_dir, process, phase)))
        launch.finish()
        outcome.wrong += runs.faults_of(launch, run_dir, bench.curve)
    slow = [text for text in outcome.wrong if not text.startswith("noticed after")]
    assert (slow, len(outcome.noticed), max(outcome.noticed) < 25) == ([], 3, True)


def test_the_table_keeps_rows_that_did_not_run(
    faults: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- faults -->\n<!-- end -->\nafter\n")
    monkeypatch.setattr(faults, "PAGE", page)
    told = faults.fault_runs.Told("step", 0.61, 12.2, 5, 0)
    first, second = faults.ROWS[0], faults.ROWS[1]
    one, two = faults.Outcome(times=1), faults.Outcome(times=1, wrong=["it hangs"])
    one.add(told)
    one.add(told._replace(noticed=0.9, again=3))
    faults.write_page({second.fault: faults.line_of(second, two)})
    faults.write_page({first.fault: faults.line_of(first, one)})
    lines = page.read_text().splitlines()
    rows = [line for line in lines if line.startswith("| SIG")]
    assert rows[0].endswith("| 1 | 0.6 to 0.9 | 12 | 3 to 5 |")
    assert rows[1].startswith(f"| {second.fault} | **1 of it does not hold**")
    assert len(rows) == 2 and (lines[0], lines[-1]) == ("before", "after")


def test_a_late_word_and_lost_steps_are_faults(faults: Any) -> None:
    outcome = faults.Outcome()
    told = faults.fault_runs.Told("save", 1.0, None, 9, 3)  # three of them during the save
    outcome.add(told)
    assert outcome.wrong == []
    outcome.add(told._replace(noticed=6.0, under_way=2))
    assert outcome.wrong == ["noticed after 6.0 s", "9 steps computed again"]
    assert len({row.name for row in faults.ROWS}) == len(faults.ROWS)


def test_a_save_is_under_way_where_this_start_writes_one(faults: Any, tmp_path: Path) -> None:
    in_save = faults.fault_runs.in_save(tmp_path, 1)
    said = {"phase": "step", "step": 13, "pid": os.getpid(), "ended": False, "attempt": 1e12}
    partial = tmp_path / "checkpoints" / "step_00000012.partial"
    partial.mkdir(parents=True)
    assert in_save() is None  # nothing is saved yet, and nobody there
    (tmp_path / "checkpoints" / "step_00000006").mkdir()
    (tmp_path / "processes").mkdir()
    (tmp_path / "processes" / "process_1.json").write_text(json.dumps(said))
    assert in_save() is None  # an earlier start left it
    (tmp_path / "processes" / "process_1.json").write_text(json.dumps(said | {"attempt": 1.0}))
    assert in_save() == os.getpid()
    partial.rename(tmp_path / "checkpoints" / "step_00000012")
    assert in_save() is None


def test_a_name_that_is_none_is_said(faults: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        faults.main(["--only", "nothing"])
    assert caught.value.code == 2 and "choose names of --list" in capsys.readouterr().err
