"""What a model thinks, shown beside its answer: on stderr, dim on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from moe_jax.utils.progress import say


class ReasoningWriter:
    """Writes reasoning as it comes, and a line's end before the answer that follows on stdout.

    writer = ReasoningWriter(show=None)
    write_pieces(writer.around(reply_pieces(..., reasoning=writer)))
    """

    def __init__(self, show: bool | None):
        """`show`: None shows reasoning on a terminal alone."""
        self._show = sys.stderr.isatty() if show is None else show
        self._open = self._heard = False

    def __call__(self, text: str) -> None:
        """Shows a piece of reasoning."""
        self._heard = True
        if self._show:
            sys.stderr.write(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text)
            sys.stderr.flush()
            self._open = not text.endswith("\n")

    def around(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces of an answer, which begins on a line of its own; says where there is none."""
        answered = self._open = self._heard = False
        for piece in pieces:
            if piece.strip():
                answered = True
                self._end_line()
            yield piece
        self._end_line()
        if self._heard and not answered:
            say("The reply ended before its answer: raise --max-tokens, or try --thinking off.")

    def _end_line(self) -> None:
        if self._open:
            sys.stderr.write("\n")
            sys.stderr.flush()
            self._open = False
