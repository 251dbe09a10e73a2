"""Signals, noted for the loop to look at between steps or tokens, so that nothing is left half
written.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn


@contextmanager
def noted_signals(*numbers: signal.Signals) -> Iterator[list[int]]:
    """A list that becomes true at the first of these signals. A second one has its usual effect."""
    received: list[int] = []
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_on_sigterm() -> None:
    """From now on SIGTERM ends the process with a sentence and exit code 143; training notes it
    instead and saves.
    """
    signal.signal(signal.SIGTERM, _terminated)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    print("moe-jax: terminated.", file=sys.stderr)
    raise SystemExit(128 + number)
