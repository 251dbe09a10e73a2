"""Supervision of processes: what is said, stopped, restarted and kept, with programs that only do
what they are told (tests/support/launched.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_jax.launch import processes
from moe_jax.launch.processes import Job, supervise
from tests.support import ROOT
from tests.support.command import run_module
from tests.support.launching import launched_arguments

TRAIN = ("train", "tiny.yaml", "--overwrite", "--set", "seed=1")


def run(tmp_path: Path, *starts: list[str], job: Job | None = None, restarts: int = 0) -> int:
    """Exit code of a launch whose n-th start has the n-th scripts; the last ones serve again."""
    job = job or Job(("chat",), len(starts[0]))
    count = 0
    jobs: list[Job] = []

    def arguments(job: Job, process: int, port: int) -> list[str]:
        nonlocal count
        if process == 0:
            count += 1
            jobs.append(job)
        return launched_arguments(tmp_path, process, starts[min(count, len(starts)) - 1][process])

    code = supervise(job, max_restarts=restarts, wait=0.01, arguments_of=arguments)
    (tmp_path / "starts.json").write_text(json.dumps([job.command for job in jobs]))
    return code


def starts(tmp_path: Path) -> list[list[str]]:
    return [list(command) for command in json.loads((tmp_path / "starts.json").read_text())]


def lives(tmp_path: Path, process: int) -> bool:
    """Whether a process is there; one that ended and that nobody waited for is not."""
    pid = (tmp_path / f"pid_{process}").read_text()
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_command_line_of_a_process():
    words = processes.child_arguments(Job(("train", "a.yaml"), 2), 1, 1234)
    rest = ["--coordinator", "127.0.0.1:1234", "--num-processes", "2", "--process-id", "1"]
    assert words == [sys.executable, "-m", "moe_jax", "train", "a.yaml", *rest]
    # What follows -- is no option, so ours stand before it.
    words = processes.child_arguments(Job(("train", "--", "a.yaml"), 1), 0, 1)
    assert words[-2:] == ["--", "a.yaml"] and "--process-id" in words


def test_process_0_alone_prints_and_all_must_end(tmp_path, capfd):
    assert run(tmp_path, ["out=first;await=last", "out=second;make=last"]) == 0
    out, err = capfd.readouterr()
    assert out == "first\n" and err == ""


def test_a_death_ends_the_others_and_is_told(tmp_path, capfd):
    """Also a stopped process, and one that waits; the phase is what the process wrote last."""
    run_dir = tmp_path / "run"
    (run_dir / "processes").mkdir(parents=True)
    waits = "make=up;await=never"
    scripts = [waits, "await=state;say=at work;say=*** stack ***;kill=9", f"kill={signal.SIGSTOP}"]
    job = Job(("train",), 3, run_dir=run_dir)

    def arguments(job: Job, process: int, port: int) -> list[str]:
        return launched_arguments(tmp_path, process, scripts[process])

    watcher = subprocess.Popen(
        [sys.executable, "-m", "tests.support.phase_writer", tmp_path, run_dir], cwd=ROOT
    )
    assert supervise(job, arguments_of=arguments) == 137
    assert watcher.wait(30) == 0
    assert not any(lives(tmp_path, process) for process in range(3))
    assert capfd.readouterr().err == (
        "moe-jax launch: process 1 of 3 was killed by SIGKILL in phase 'step' at step 15; the last "
        "lines of its log:\n  | at work\n"
    )


@pytest.mark.parametrize(
    "complaint",
    ["exit=69", "say=Gloo all-reduce failed: Connection closed by peer;kill=6"],
    ids=["exit code", "words"],
)
def test_who_only_lost_its_peer_is_not_blamed(tmp_path, capfd, complaint):
    scripts = [f"await=up;make=down;{complaint}", "make=up;await=down;say=ValueError: x;exit=1"]
    assert run(tmp_path, scripts) == 1
    told = capfd.readouterr().err.splitlines()[-2:]
    assert told[0].startswith("moe-jax launch: process 1 of 2 ended with exit code 1;")
    assert told[1] == "  | ValueError: x"


def test_a_hang_is_called_one(tmp_path, capfd):
    assert run(tmp_path, ["await=never", "exit=75"]) == 75
    assert "process 1 of 2 ended with exit code 75 (it hung)" in capfd.readouterr().err


@pytest.mark.parametrize(
    "first", ["say=moe-jax: process 1: no such file.;exit=2", "await=never"], ids=["told", "silent"]
)
def test_a_mistake_of_the_user_is_said_once_and_not_tried_again(tmp_path, capfd, first):
    scripts = [first, "say=remark;say=moe-jax: process 1: no such file.;exit=2"]
    assert run(tmp_path, scripts, restarts=3) == 2
    assert capfd.readouterr().err == "moe-jax: process 1: no such file.\n"
    assert len(starts(tmp_path)) == 1


def test_restarts_go_on_from_the_newest_checkpoint_until_none_is_new(tmp_path, capfd):
    run_dir = tmp_path / "run"
    job = Job(TRAIN, 1, run_dir=run_dir)
    makes = "make=run/checkpoints/step_00000020/x;kill=9"
    code = run(tmp_path, ["kill=9"], ["kill=9"], [makes], ["exit=7"], job=job, restarts=2)
    assert code == 7
    # Two in vain, then one with a checkpoint, after which two may fail again.
    assert starts(tmp_path)[0] == list(TRAIN)
    again = ["train", "tiny.yaml", "--set", "seed=1", "--resume", "--fallback"]
    assert starts(tmp_path)[1:] == [again] * 4
    err = capfd.readouterr().err
    assert "restart 1 of at most 2 in 0.01 s, from the beginning." in err
    assert "restart 2 of at most 2 in 0.02 s, from the checkpoint of step 20." in err
    assert err.endswith("giving up after 2 restarts without a new checkpoint.\n")


def test_a_server_is_started_again_as_it_was(tmp_path, capfd, monkeypatch):
    job = Job(("serve", "model"), 1)
    assert run(tmp_path, ["kill=9"], ["exit=7"], job=job, restarts=1) == 7
    assert starts(tmp_path) == [["serve", "model"]] * 2
    assert capfd.readouterr().err.endswith("giving up after 1 restarts.\n")
    monkeypatch.setattr(processes, "STEADY", 0.0)  # each death is the first one
    assert run(tmp_path, ["kill=9"], ["kill=9"], ["kill=9"], [""], job=job, restarts=1) == 0


def test_a_restart_that_succeeds_is_a_success(tmp_path, capfd):
    assert run(tmp_path, ["kill=9", "await=never"], ["", ""], restarts=1) == 0


def test_a_port_that_was_taken_is_tried_again_elsewhere(tmp_path, capfd):
    taken = "say=moe-jax: --coordinator x:1: process 0 cannot listen on port 1 (in use).;exit=2"
    assert run(tmp_path, [taken, "await=never"], ["out=here", ""]) == 0
    assert capfd.readouterr() == ("here\n", "")
    assert run(tmp_path, [taken]) == 2
    assert len(starts(tmp_path)) == processes.PORTS
    assert "cannot listen" in capfd.readouterr().err


def test_environment_of_the_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PARENT_VARIABLE", "OTHER")
    seen: list[dict[str, str]] = []
    start = subprocess.Popen

    def popen(*arguments, env, **options):
        seen.append(env)
        return start(*arguments, env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    assert run(tmp_path, [""], job=Job(("train",), 1, devices=4)) == 0
    assert seen[0]["JAX_NUM_CPU_DEVICES"] == "4" and seen[0]["OTHER"] == str(os.getpid())


# Logs


DUMP = (
    "say=*** Check failure stack trace: ***;say=    @     0x7f00;say=F1127 11:00:00.1 client.h] x;"
    "say=[Gloo] Rank 0 is connected"
)


def test_the_terminal_is_spared_dumps_which_the_log_has(tmp_path, capfd):
    run_dir = tmp_path / "run"
    job = Job(("train",), 2, run_dir=run_dir)
    script = f"say=one;{DUMP};say=two;make=run/config.yaml;make=up;say=three"
    assert run(tmp_path, [script, "say=quiet;await=up"], job=job) == 0
    assert capfd.readouterr().err == "one\ntwo\nthree\n"
    log = (run_dir / "logs" / "process_0.log").read_text().splitlines()
    assert log[0] == "one" and log[-1] == "three" and len(log) == 7
    assert (run_dir / "logs" / "process_1.log").read_text() == "quiet\n"
    assert run(tmp_path, ["say=four", ""], job=job) == 0
    assert (run_dir / "logs" / "process_0.log").read_text().endswith("three\nfour\n")


def test_nothing_is_written_where_no_run_began(tmp_path, capfd):
    job = Job(("train",), 1, run_dir=tmp_path / "run")
    assert run(tmp_path, ["say=moe-jax: no.;exit=2"], job=job) == 2
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_to_be_overwritten_does_not_get_the_log(tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    job = Job(TRAIN, 1, run_dir=tmp_path / "run")
    assert run(tmp_path, ["say=moe-jax: no.;exit=2"], job=job) == 2
    assert not (tmp_path / "run" / "logs").exists()


def test_logs_elsewhere(tmp_path, capfd):
    job = Job(("chat",), 2, log_dir=tmp_path / "logs")
    assert run(tmp_path, ["say=a", "say=b"], job=job) == 0
    assert (tmp_path / "logs" / "process_1.log").read_text() == "b\n"


def test_tracebacks_wait_for_the_end_and_progress_does_not(tmp_path, capfd):
    trace = "say=Traceback (most recent call last):;say=  File x;say=OSError: y"
    assert run(tmp_path, [f"bar=10%;bar=20%;{trace};exit=1", "await=never"]) == 1
    err = capfd.readouterr().err
    assert err.startswith("\r10%\r\r20%\r") and err.count("OSError: y") == 1
    assert "  | Traceback (most recent call last):\n  |   File x\n  | OSError: y\n" in err
    assert run(tmp_path, [f"await=pid_1;{trace};await=never", "await=pid_0;exit=3"]) == 3
    assert "OSError" not in capfd.readouterr().err


# Signals and ends


def start(tmp_path: Path, *scripts: str) -> subprocess.Popen[str]:
    """A launch of its own, once all of its processes run."""
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.support.launching", tmp_path, *scripts],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: all((tmp_path / f"pid_{n}").exists() for n in range(len(scripts))))
    return program


def test_a_signal_is_passed_to_process_0_once(tmp_path):
    saves = "await=saved_0;out=saved"
    program = start(tmp_path, f"read;{saves}", saves)
    program.send_signal(signal.SIGTERM)
    program.send_signal(signal.SIGTERM)  # as `timeout` does
    assert program.communicate("typed\n", timeout=30) == ("typed\nsaved\n", "")
    assert program.returncode == 0 and not (tmp_path / "saved_1").exists()


def test_a_second_signal_kills(tmp_path):
    program = start(tmp_path, "await=never", "await=never")
    program.send_signal(signal.SIGTERM)
    until((tmp_path / "saved_0").exists)
    time.sleep(1.1)
    program.send_signal(signal.SIGTERM)
    program.communicate(timeout=30)
    assert program.returncode == 143
    assert not lives(tmp_path, 0) and not lives(tmp_path, 1)


def test_at_a_terminal_process_0_reads_and_gets_ctrl_c_once(tmp_path):
    scripts = ["read;make=typed;interrupted;out=stopped;make=over", "await=over"]
    done = run_module("at_terminal", tmp_path, *scripts, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["typed", "typed", "^Cstopped"]  # the first is the echo
    assert [path.name[:5] for path in tmp_path.glob("int_*")] == ["int_0"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a stopped process stays")
def test_no_process_outlives_launch(tmp_path):
    program = start(tmp_path, "await=never", f"kill={signal.SIGSTOP}")
    program.kill()
    program.communicate(timeout=30)
    until(lambda: not lives(tmp_path, 0) and not lives(tmp_path, 1))
    assert program.returncode == -signal.SIGKILL
