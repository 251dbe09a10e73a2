"""Output whose reader goes away while the work goes on."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest
from rich.console import Console

from moe_jax.runtime.lasting_output import lasting_output

NOTICE = "Nobody reads."


def closed_pipe() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed_terminal() -> TextIO:
    master, slave = os.openpty()
    os.close(master)
    return os.fdopen(slave, "w", buffering=1)


def full_disk() -> TextIO:
    return open("/dev/full", "w")


@pytest.mark.parametrize(
    "make", [closed_pipe, closed_terminal, full_disk], ids=lambda make: make.__name__
)
def test_what_nobody_can_read_does_not_end_the_work(
    make: Callable[[], TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    if make is full_disk and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    dead, errors = make(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", dead)
    monkeypatch.setattr(sys, "stderr", errors)
    with lasting_output(NOTICE):
        console = Console()
        for number in range(3):
            print("a line", number, flush=True)
            console.print("another")
        sys.stdout.writelines(["more\n", "and more\n"])
        print("x" * 100_000)
    assert sys.stdout is dead and sys.stderr is errors
    assert errors.getvalue() == f"{NOTICE}\n"
    print("after it", flush=True)  # the descriptor itself leads nowhere now
    dead.close()


def test_a_dead_stderr_ends_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_pipe() as out, closed_pipe() as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with lasting_output(NOTICE):
            print("a warning", file=sys.stderr, flush=True)
            print("a line", flush=True)
            print("a warning", file=sys.stderr, flush=True)
        assert (sys.stdout, sys.stderr) == (out, err)


def test_a_process_without_a_stdout_may_print(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has None there when the descriptor was closed at the start."""
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_output(NOTICE):
        print("a line", flush=True)
        Console().print("another")
    assert sys.stdout is None


def test_what_is_read_arrives_and_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", kept)
    with lasting_output(NOTICE):
        print("a line")
        assert sys.stdout.encoding == "ascii"
        with pytest.raises(UnicodeEncodeError):
            print("caf\u00e9")
    kept.flush()
    assert kept.buffer.getvalue().startswith(b"a line\n")  # type: ignore[attr-defined]
