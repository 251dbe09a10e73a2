"""Parquet files, opened and closed; only who has one needs pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError


@contextmanager
def open_parquet(path: Path, unreadable: Callable[[Path, Exception], UserError]) -> Iterator[Any]:
    """The open `pyarrow.parquet.ParquetFile`, closed when the block ends.

    Raises UserError where there is no pyarrow, and what `unreadable` makes of an error of the file,
    whether it shows at once or while rows are read in the block.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} needs the `pyarrow` package: pip install pyarrow, or give another kind of "
            f"file."
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from error
