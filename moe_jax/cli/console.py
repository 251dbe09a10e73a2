"""What the commands write and read: text and results to stdout, prompts from stdin; what the file
system refuses as one sentence.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.utils.units import gibibytes


@contextlib.contextmanager
def explained_disk_errors(place: Path | None = None) -> Iterator[None]:
    """Turns what the file system refuses into a sentence naming the file, or `place` where the
    error names none.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or place
        if where is None:
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{where}: no space is left on its disk; free some, then continue (train: with "
                f"--resume)."
            ) from error
        if error.filename is None:
            raise
        if error.errno == errno.EROFS:
            raise UserError(
                f"{where}: its file system is read-only; name another place."
            ) from error
        if error.errno in (errno.ENOSYS, errno.ENOTSUP):
            raise UserError(
                f"{where}: its file system cannot do what is needed ({error.strerror}); name a "
                f"place on another one."
            ) from error
        raise UserError(
            f"{where}: {error.strerror or error}; check the path and its permissions."
        ) from error


def write_pieces(pieces: Iterable[str]) -> str:
    """Writes pieces of text to stdout as they come; returns the whole."""
    written: list[str] = []
    for piece in pieces:
        written.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    return "".join(written)


def prompt_from_stdin() -> str:
    """All of stdin, without a byte order mark. Raises UserError where it is not text."""
    try:
        return sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt - read bytes that are not text (byte {error.start}): give UTF-8."
        ) from error


def print_results(results: Mapping[str, Any], *, as_json: bool) -> None:
    """Prints results by name, as JSON or as lines; lists by layer are in the JSON alone."""
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for name, value in results.items():
        if not name.endswith("_by_layer"):
            label = re.sub(r"_(seconds|bytes)$", "", name).replace("_", " ")
            label = re.sub("(read )?bytes per", "read per", label)
            print(f"{label:28} {_readable(name, value)}")


def _readable(name: str, value: Any) -> str:
    if "bytes" in name:
        return gibibytes(value) + ("/s" if name.endswith("per_second") else "")
    if name.startswith("share") or name.endswith("hit_rate"):
        return f"{value:.1%}"
    if name.endswith("_seconds"):
        return f"{value:,.4g} s"
    return f"{value:,.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def peak_memory() -> str:
    """The most memory that was in use, as a remark."""
    from moe_jax.profiling import machine

    return f"peak memory {gibibytes(machine.peak_bytes())}"
