"""A progress bar that counts bytes, on stderr: loading, converting and exporting show theirs
through it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_T = TypeVar("_T")

MEANINGFUL = 1 << 28  # bytes from which work takes long enough for a bar


@contextmanager
def byte_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for `total` bytes; what is given is called with the bytes done since. Shown on a
    terminal, for much work alone.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    hidden = _muted or total < MEANINGFUL or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


def with_progress(what: str, things: Iterable[_T], total: int) -> Iterator[_T]:
    """The things, with a bar on a terminal that counts them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn())
    hidden = _muted or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
        yield from progress.track(things, total)


_muted = False


def mute() -> None:
    """From now on this process, which is not the first of several, makes no remarks."""
    global _muted
    _muted = True


def say(text: str) -> None:
    """A remark on stderr, dim on a terminal."""
    if not _muted:
        shown = f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text
        print(shown, file=sys.stderr, flush=True)


@functools.cache
def say_once(text: str) -> None:
    """`say`, where several steps of a process come upon the same remark."""
    say(text)
