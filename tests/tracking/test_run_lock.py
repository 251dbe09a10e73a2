"""One process per run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_jax.errors import UserError
from moe_jax.tracking import run_lock
from moe_jax.tracking.run_lock import LOCK_FILE, locked
from tests.support import ROOT


def begin(run_dir: Path) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text("name: x\n")


def test_a_second_one_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    begin(tmp_path)
    with locked(tmp_path):
        words = f"in use by another .*process {os.getpid()} on"
        with pytest.raises(UserError, match=words), locked(tmp_path):
            pytest.fail("two hold the lock")
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path):
        pass


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    begin(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-m", "tests.support.lock_holder", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    words = rf"process {holder.pid} on .*: wait until it ends"
    with pytest.raises(UserError, match=words), locked(tmp_path):
        pytest.fail("two processes hold the lock")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK_FILE).read_text()


def test_of_a_run_that_did_not_begin_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), locked(tmp_path / "runs" / "first"):
        assert (tmp_path / "runs" / "first" / LOCK_FILE).exists()
        raise SystemExit(143)
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "runs" / "first"):
        begin(tmp_path / "runs" / "first")
    assert (tmp_path / "runs" / "first" / "config.yaml").exists()
    with locked(tmp_path / "runs" / "second"):
        (tmp_path / "runs" / "second" / "mine.txt").write_text("x")
    assert [path.name for path in (tmp_path / "runs" / "second").iterdir()] == ["mine.txt"]


def test_other_processes_of_the_same_run_hold_nothing(tmp_path: Path) -> None:
    with locked(tmp_path), locked(tmp_path, active=False):
        pass
    with locked(tmp_path / "new", active=False):
        assert not (tmp_path / "new").exists()


def test_a_file_that_was_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path)
    real, calls = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:  # another process, which began no run, has just ended
            (tmp_path / LOCK_FILE).unlink()
        real(descriptor, how)

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with locked(tmp_path), pytest.raises(UserError, match="in use"), locked(tmp_path):
        pytest.fail("two hold the lock")
    assert len(calls) == 3


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with locked(tmp_path):
        pass
    assert f"The file system of {tmp_path} has no locks" in capsys.readouterr().err


def test_other_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with pytest.raises(OSError, match=rf"Input/output error: '.*{LOCK_FILE}'"), locked(tmp_path):
        pass
