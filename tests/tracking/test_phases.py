"""Phases of a process: times that add up, a file that is whole, a watchdog, accounts of attempts
that ended. All times are told by the tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moe_jax.errors import UserError
from moe_jax.runtime import process
from moe_jax.tracking.phases import Phases
from moe_jax.tracking.process_files import (
    close_last_attempt,
    process_path,
    read_attempts,
    read_processes,
    steps_done,
)
from tests.support.command import run_module


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def phases_of(run_dir: Path, clock: Clock, **options: object) -> tuple[Phases, list[str]]:
    """Phases without a thread, and what the watchdog said."""
    (run_dir / "processes").mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    return Phases(run_dir, now=clock, on_hang=said.append, **options), said  # type: ignore[arg-type]


def test_seconds_by_phase_add_up_to_the_time_of_the_attempt(tmp_path: Path) -> None:
    clock = Clock()
    phases, _ = phases_of(tmp_path, clock)
    clock.time += 3
    phases.enter("data", 11)
    clock.time += 1
    phases.enter("compile", 11)
    clock.time += 8
    for step in (12, 13):
        phases.enter("data", step)
        clock.time += 0.25
        phases.enter("step", step)
        clock.time += 1.75
    phases.enter("checkpoint", 13)
    clock.time += 5
    phases.write()
    (said,) = read_processes(tmp_path)
    assert said["seconds"] == {
        "start": 3.0,
        "data": 1.5,
        "compile": 8.0,
        "step": 3.5,
        "checkpoint": 5.0,
    }
    assert sum(said["seconds"].values()) == said["beat"] - said["attempt"] == 21.0
    assert (said["step"], said["phase"], said["since"]) == (13, "checkpoint", 1016.0)
    assert (said["from_step"], said["pid"], said["processes"]) == (10, os.getpid(), 1)
    assert said["step_seconds"] == 2.0  # of step 12; the eleventh compiled
    assert not said["ended"] and steps_done(said) == 13
    phases.enter("step", 14)
    assert steps_done(phases.said()) == 13


def test_an_attempt_counts_from_where_the_command_began(tmp_path: Path) -> None:
    process.prepare_process()
    clock = Clock()
    clock.time = 1e12
    assert phases_of(tmp_path, clock)[0].attempt < 1e11
    assert phases_of(tmp_path, clock)[0].attempt == 1e12  # and the next from itself


def test_a_phase_that_stands_still_too_long_is_a_hang(tmp_path: Path) -> None:
    clock = Clock()
    phases, said = phases_of(tmp_path, clock, hang_timeout=20.0)

    def wait(seconds: int) -> None:
        for _ in range(seconds):
            clock.time += 1
            phases.look()

    wait(590)  # starting may take long
    phases.enter("compile", 1)
    wait(590)
    for step in range(2, 9):
        phases.enter("data", step)
        wait(15)
        phases.enter("step", step)
        wait(15)
    clock.time += 7200  # stopped itself, or the machine slept: it did not look
    phases.look()
    assert not said
    wait(2)
    assert said == [
        "process 0 has stood in phase step of step 8 for 21 s, which is longer than "
        "train.hang_timeout: the stacks of its threads say where."
    ]
    (told,) = read_processes(tmp_path)
    assert told["seconds"]["hang"] > 20
    assert sum(told["seconds"].values()) == pytest.approx(told["beat"] - told["attempt"])


def test_the_limit_follows_the_slowest_step(tmp_path: Path) -> None:
    clock = Clock()
    phases, _ = phases_of(tmp_path, clock)
    assert phases.limit() == 600
    phases.enter("compile", 1)
    phases.enter("data", 2)
    assert phases.limit() == 60
    for step, seconds in ((3, 30.0), (4, 1.0)):
        clock.time += seconds
        phases.enter("data", step)
    assert phases.limit() == 300
    phases.enter("checkpoint", 4)
    assert phases.limit() == 600


def test_the_process_that_keeps_the_others_waiting_is_named(tmp_path: Path) -> None:
    clock = Clock()
    waiting, said = phases_of(tmp_path, clock, process=1, processes=3, hang_timeout=10.0)
    others = {
        number: phases_of(tmp_path, clock, process=number, processes=3)[0] for number in (0, 2)
    }

    def hang(*writers: int) -> str:
        waiting.enter("step", 9)
        waiting.look()
        said.clear()
        for _ in range(12):
            clock.time += 1
            for number in writers:
                others[number].write()
            waiting.look()
        return said[0].partition("train.hang_timeout: ")[2]

    assert hang(0) == "process 2 has said nothing yet."
    others[0].enter("step", 9)
    others[2].enter("checkpoint", 8)
    assert "is still in phase checkpoint of step 8." in hang(0, 2)
    assert hang(0, 2).startswith("process 2 on ")
    others[2].enter("step", 9)
    assert hang(0, 2) == "all processes are at this step, so none can be named."
    said_nothing = hang(2)
    assert said_nothing.startswith("process 0 on ") and "has said nothing for" in said_nothing


def test_a_process_that_hangs_ends_with_its_stacks_and_a_sentence(tmp_path: Path) -> None:
    ended = run_module("hanging_process", tmp_path, 0.2, timeout=60)
    assert ended.returncode == 75
    assert "hanging_process.py" in ended.stderr and "Thread 0x" in ended.stderr  # its stacks
    *_, last = ended.stderr.splitlines()
    assert last.startswith("moe-jax: process 0 has stood in phase step of step 7 for ")
    (said,) = read_processes(tmp_path)
    assert said["seconds"]["hang"] > 0.2 and not said["ended"]


def test_the_next_attempt_keeps_the_account_of_the_last(tmp_path: Path) -> None:
    clock = Clock()
    for number, late in ((0, 5.0), (1, 0.0), (2, 9.0)):  # 2 lived longest
        killed, _ = phases_of(tmp_path, clock, process=number, processes=3)
        killed.enter("compile", 1)
        clock.time = 1000.0 + late
        killed.write()
    clock.time = 1010.0
    faster, _ = phases_of(tmp_path, clock, process=1, processes=2)  # than process 0 of this attempt
    faster.write()
    (tmp_path / "attempts.jsonl").write_text('{"process": 0, "be')  # a kill cut it short
    close_last_attempt(tmp_path, 1010.0)
    (account,) = read_attempts(tmp_path)
    assert (account["process"], account["beat"]) == (2, 1009.0)
    assert [said["process"] for said in read_processes(tmp_path)] == [1]
    close_last_attempt(tmp_path, 1010.0)
    assert len(read_attempts(tmp_path)) == 1


def test_an_attempt_that_computed_nothing_leaves_nothing(tmp_path: Path) -> None:
    with Phases(tmp_path / "new"):
        assert [said["phase"] for said in read_processes(tmp_path / "new")] == ["start"]
    assert not list((tmp_path / "new").iterdir())
    with Phases(tmp_path / "new") as phases:
        phases.enter("compile", 1)
    (said,) = read_processes(tmp_path / "new")
    assert said["ended"]


def test_a_refused_start_restores_old_accounts_and_leaves_what_the_others_say(
    tmp_path: Path,
) -> None:
    """They write and clear their own files at the same time."""
    old, _ = phases_of(tmp_path, Clock(), process=1, processes=2)
    old.write()
    account = process_path(tmp_path, 1).read_bytes()
    with Phases(tmp_path, processes=2):
        assert read_attempts(tmp_path)
    assert process_path(tmp_path, 1).read_bytes() == account and not read_attempts(tmp_path)

    said = json.loads(account) | {"beat": 1e12}  # a process of this start
    process_path(tmp_path, 1).write_text(json.dumps(said))
    writing = tmp_path / "processes" / "process_2.json.part"
    writing.symlink_to("moved")  # listed, and gone when it is opened
    with Phases(tmp_path, processes=3):
        process_path(tmp_path, 1).unlink()
        writing.unlink()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases, _ = phases_of(tmp_path, Clock())
    (tmp_path / "processes").rmdir()
    phases.write()
    phases.write()
    assert capsys.readouterr().err.count("moe-jax status is not told how this run does") == 1


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "processes").mkdir()
    for content in ("{", "[]", json.dumps({"process": 1})):
        process_path(tmp_path, 1).write_text(content)
        with pytest.raises(UserError, match=r"process_1.json does not say how a process does"):
            read_processes(tmp_path)
