"""Output that may lose its reader while the work goes on: `| head`, a `tee` that dies, a terminal
that is closed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


@contextmanager
def lasting_output(notice: str) -> Iterator[None]:
    """Within the block, a stdout or stderr that cannot be written to any more swallows what it is
    given, where otherwise the first line that nobody reads would end the process.

    When that happens to stdout, `notice` is printed on stderr.
    """
    before = sys.stdout, sys.stderr
    err = LastingStream(sys.stderr)

    def tell() -> None:
        err.write(f"{notice}\n")
        err.flush()

    sys.stdout, sys.stderr = cast(TextIO, LastingStream(sys.stdout, tell)), cast(TextIO, err)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


class LastingStream:
    """A text stream whose first failed write or flush points its descriptor at /dev/null.

    So the buffers below it, and what else writes to the descriptor, go on too. Only errors of the
    system count (a closed pipe, a terminal that is gone, a full disk); others pass upward.
    """

    def __init__(self, stream: TextIO | None, lost: Any = None):
        """`lost` is called when that happens. None in place of a stream, as Python has where the
        process was started without one, swallows everything.
        """
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115
        self._lost = lost

    def write(self, text: str) -> int:
        """As a text stream's."""
        try:
            return self._stream.write(text)
        except OSError:
            self._let_go()
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As a text stream's."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As a text stream's."""
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def _let_go(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._lost is not None:
            self._lost()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
