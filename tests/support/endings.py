"""Training runs that are killed or stopped, each at a moment of its own.

    python -m tests.support.endings FOLDER CONFIG ENDING... -- OVERRIDE...

Trains into FOLDER/ENDING, with stdout and stderr in FOLDER/ENDING.out and .err; prints how each
process ended, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_jax.checkpoint import integrity
from moe_jax.cli import main
from moe_jax.profiling import machine
from moe_jax.tracking import run_dir
from moe_jax.tracking.metrics import MetricsWriter
from moe_jax.training import trainer
from tests.support.forked import exit_codes, signal_around
from tests.support.tiny_run import RATE

KILLED = ("described", "early", "validated", "saving", "saved")
STOPPED = {
    "SIGTERM": 0,
    "SIGINT": 0,
    "SIGTERM at once": 143,
    "SIGINT at once": 130,
    "SIGTERM twice": 143,
}
SAVED = ("SIGUSR1", "SIGHUP")  # these go on, the second one without a reader of its output


def line(step: int, key: str) -> Callable[[Any, dict[str, Any]], bool]:
    """Chooses the metrics line of a step that has this key."""
    return lambda writer, record: record["step"] == step and key in record


def ignore_signals() -> None:
    """The trainer never sees that a signal came, as if the step under way never ended."""
    noted = trainer.noted_signals

    @contextlib.contextmanager
    def unseen(
        *numbers: signal.Signals, at_once: Callable[[], None] = lambda: None
    ) -> Iterator[list[int]]:
        with noted(*numbers, at_once=at_once):
            yield []

    trainer.noted_signals = unseen


def arm(ending: str) -> None:
    """Chooses the moment of the signal."""

    def writing(number: int, at: Callable[..., bool]) -> None:
        signal_around(MetricsWriter, "write", number, after=at)

    def always(*arguments: Any) -> bool:
        return True

    match ending:
        case "early":
            writing(signal.SIGKILL, line(2, "loss"))
        case "described":
            signal_around(run_dir, "write_description", signal.SIGKILL, after=always)
        case "validated":
            writing(signal.SIGKILL, line(5, "val_loss"))
        case "saving":
            at_6 = lambda path, *rest: "00000006" in str(path)  # noqa: E731
            signal_around(integrity, "seal_directory", signal.SIGKILL, after=at_6)
        case "saved":
            to_6 = lambda path, to: str(to).endswith("step_00000006")  # noqa: E731
            signal_around(Path, "rename", signal.SIGKILL, after=to_6)
        case "SIGTERM":
            writing(signal.SIGTERM, line(4, "loss"))
        case "SIGINT":
            writing(signal.SIGINT, line(2, "loss"))
        case "SIGUSR1":
            writing(signal.SIGUSR1, line(4, "loss"))
        case "SIGHUP":
            writing(signal.SIGHUP, line(4, "loss"))
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
        case "SIGTERM at once":
            signal_around(trainer, "read_corpus", signal.SIGTERM, after=always)
        case "SIGINT at once":
            signal_around(trainer, "read_corpus", signal.SIGINT, after=always)
        case "SIGTERM twice":
            writing(signal.SIGTERM, lambda writer, record: "loss" in record)
            ignore_signals()
        case _:
            raise ValueError(ending)


def train(folder: Path, config: str, overrides: list[str], ending: str) -> None:
    """One run, in a process of its own."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{ending}.{name}", os.O_WRONLY | os.O_CREAT), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    machine.matmul_rate = lambda *_: (RATE, "given by the test")
    trainer.write_report = lambda run_dir: run_dir / "report.html"
    arm(ending)
    settings = [word for text in overrides for word in ("--set", text)]
    main.main(["train", config, "--run-dir", str(folder / ending), *settings])


def run() -> None:
    folder, config, *arguments = sys.argv[1:]
    split = arguments.index("--")
    endings, overrides = arguments[:split], arguments[split + 1 :]
    codes = exit_codes(endings, lambda ending: train(Path(folder), config, overrides, ending))
    print(json.dumps(codes))


if __name__ == "__main__":
    run()
