"""Commands over several processes, forked from one that has imported everything.

    python -m tests.support.joined CASES.json

CASES.json has for each name the commands of its processes by their numbers, how many processes
there are said to be, what is amiss (`spoil`, or "busy port"), and how many seconds they may take.
Prints for each name, as JSON, how its processes ended, what they wrote, the bytes that they read
and hold of a model if they load one, and the seconds that all of it took.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_jax.cli import main as command
from moe_jax.cli import options
from moe_jax.inference import load
from moe_jax.tracking import run_lock
from moe_jax.training import trainer  # noqa: F401  here because it takes long
from tests.support.forked import run_child

LIMIT = 60.0  # seconds for all processes of a case that does not say more
AT_ONCE = 4  # cases, which wait more than they compute


class Started(NamedTuple):
    """The processes of a case."""

    folder: Path  # where they write
    pids: dict[int, int]  # the system's number of each, and its own
    listener: socket.socket
    began: float
    limit: float  # seconds

    def ended(self) -> dict[str, Any]:
        """Waits for them; those that do not end are killed."""
        codes = _await(self.pids, self.began + self.limit)
        self.listener.close()
        told = {
            kind: {number: _read(self.folder / f"{number}.{kind}") for number in codes}
            for kind in ("out", "err", "read")
        }
        return {"codes": codes, "seconds": time.monotonic() - self.began, **told}


def start_case(case: dict[str, Any], folder: Path) -> Started:
    """Starts the processes of a case, which write into a new folder."""
    folder.mkdir()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if case.get("amiss") == "busy port":
        listener.listen()
    else:
        listener.close()
    started = Started(folder, {}, listener, time.monotonic(), case.get("limit", LIMIT))
    for number, words in case["commands"].items():
        if case["processes"] > 1:
            meeting = f"--coordinator 127.0.0.1:{port} --num-processes {case['processes']}"
            words = [*words, *meeting.split(), "--process-id", number]
        if pid := os.fork():
            started.pids[pid] = int(number)
        else:
            _redirect(folder, number)
            spoil(case.get("amiss"), int(number))
            run_child(partial(_run_command, words, folder), number)
    return started


def spoil(amiss: str | None, number: int) -> None:
    """Makes process 1 another one than process 0."""
    if number == 1 and amiss == "version":
        setattr(options, "__version__", "0.0.1")  # noqa: B010
    if number == 1 and amiss == "unseen directory":  # as if it were on another host's disk
        setattr(run_lock, "LOCK_FILE", ".elsewhere")  # noqa: B010


def _run_command(words: list[str], folder: Path, number: str) -> None:
    """Runs a command; writes how many bytes of weights it read and holds, if it loads a model."""
    opened: list[Any] = []
    _keep_result(load.hf, "open_checkpoint", opened)
    _keep_result(load, "read_params", opened)
    try:
        command.main(words)
    finally:
        if len(opened) == 2:
            held = {
                (number, str(shard.index)): shard.data.nbytes
                for number, leaf in enumerate(jax.tree.leaves(opened[1]))
                for shard in leaf.addressable_shards
            }
            read = {"read": opened[0].bytes_read, "share": sum(held.values())}
            (folder / f"{number}.read").write_text(json.dumps(read))


def _keep_result(owner: Any, name: str, kept: list[Any]) -> None:
    real: Callable[..., Any] = getattr(owner, name)

    def keeping(*arguments: Any, **options: Any) -> Any:
        kept.append(real(*arguments, **options))
        return kept[-1]

    setattr(owner, name, keeping)


def _redirect(folder: Path, number: str) -> None:
    """What this process writes goes to files."""
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{number}.{kind}", os.O_WRONLY | os.O_CREAT), descriptor)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _await(pids: dict[int, int], end: float) -> dict[int, int | None]:
    """The exit codes by process; None for one that did not end in time."""
    codes: dict[int, int | None] = {}
    while len(codes) < len(pids):
        for pid, number in pids.items():
            if number in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[number] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[number] = None
        time.sleep(0.01)
    return dict(sorted(codes.items()))


def run() -> None:
    warnings.filterwarnings("ignore", message=".*fork")
    jax.config.update("jax_platforms", "cpu")
    cases, ended = json.loads(Path(sys.argv[1]).read_text()), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, len(cases), AT_ONCE):
            names = list(cases)[first : first + AT_ONCE]
            started = {name: start_case(cases[name], Path(folder) / name) for name in names}
            ended |= {name: one.ended() for name, one in started.items()}
    print(json.dumps(ended))


if __name__ == "__main__":
    run()
