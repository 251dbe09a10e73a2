"""A progress bar that counts bytes, on stderr: loading, converting and exporting show theirs
through it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
