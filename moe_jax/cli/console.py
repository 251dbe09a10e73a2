"""What the commands for text write and read: text to stdout as it comes, figures and remarks to
stderr, prompts from stdin.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax.errors import UserError

if TYPE_CHECKING:
    pass


@contextlib.contextmanager
def explained_disk_errors(place: Path) -> Iterator[None]:
    """Turns what the file system refuses into a sentence naming the file, or `place` where the
    error names none.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or place
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{where}: no space is left on its disk; free some, then continue (train: with "
                f"--resume)."
            ) from error
        if error.filename is None:
            raise
        raise UserError(
            f"{where}: {error.strerror or error}; check the path and its permissions."
        ) from error


def write_pieces(pieces: Iterable[str]) -> str:
    """Writes pieces of text to stdout as they come; returns the whole. Raises UserError where
    stdout cannot hold them.
    """
    written: list[str] = []
    try:
        for piece in pieces:
            written.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except UnicodeEncodeError as error:
        raise UserError(
            f"standard output is {error.encoding} and cannot show {error.object!r}: set "
            f"PYTHONIOENCODING=utf-8."
        ) from error
    return "".join(written)


def prompt_from_stdin() -> str:
    """All of stdin. Raises UserError where it is not text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt - read bytes that are not text (byte {error.start}): give UTF-8."
        ) from error
