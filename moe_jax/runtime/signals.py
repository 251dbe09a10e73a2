"""Signals, noted for the loop to look at between steps or tokens, so that nothing is left half
written.
"""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from moe_jax.runtime.distributed import Agreement, process_count


@contextmanager
def noted_signals(
    *numbers: signal.Signals, at_once: Callable[[], None] = lambda: None
) -> Iterator[list[int]]:
    """A list that becomes true at the first of these signals, when `at_once` is called. A second
    one has its usual effect.
    """
    received: list[int] = []
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])
        at_once()

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# What asks a run to save and go on: a terminal that is closed, and the warnings that schedulers
# send some time before they end a job (SLURM's --signal, Grid Engine's -notify).
SAVE_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def collected_signals(*numbers: signal.Signals) -> Iterator[list[signal.Signals]]:
    """A list that gets each of these signals as often as it comes, which then has no other effect;
    the caller takes them out.
    """
    received: list[signal.Signals] = []
    previous: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in numbers}
    for number in previous:
        signal.signal(number, lambda number, frame: received.append(signal.Signals(number)))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_texts = itertools.count()  # so far, by which processes know what they agree on


def until_noted(noted: list[int], pieces: Generator[str, None, None]) -> Iterator[str]:
    """The pieces until a signal is noted, which is seen between two of them, so that no model's
    cache is left half written. Several processes stop after the same piece, whichever was told to.
    """
    together = Agreement(f"text {next(_texts)}") if process_count() > 1 else None
    for number, piece in enumerate(pieces):
        yield piece
        stops = bool(noted)
        if together is not None:
            if stops:
                together.ask(number, "stop")
            stops = bool(together.take(number))
        if stops:
            pieces.close()
            return


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM ends the process with a sentence and exit code 143; training notes it
    instead and saves.
    """
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    print("moe-jax: terminated.", file=sys.stderr)
    raise SystemExit(128 + number)
