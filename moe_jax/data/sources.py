"""The documents of `data.source`: the built-in corpus, files and folders, or a hub dataset.

The order is fixed, so that the same source gives the same corpus. In a folder, files of unknown
kinds are ignored. A file of a known kind that cannot be read is refused by its name and, if it has
lines, the line.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_jax.config.schema import DataConfig
from moe_jax.errors import UserError


def read_documents(config: DataConfig) -> Iterator[str]:
    """The documents of `data.source`, read lazily; some may be blank.

    Raises:
      UserError: the source is missing or cannot be read, or a document lacks `data.text_field`.
    """
    if config.source == "builtin":
        return _builtin_documents()
    if config.source.startswith("hf:"):
        return _hub_documents(config)
    path = Path(os.path.expanduser(config.source))
    if not os.path.exists(path):  # Path.exists raises where a parent folder may not be entered
        raise UserError(
            f"data.source={config.source!r} does not exist: use 'builtin', 'hf:NAME', or the path "
            f"of a file or folder."
        )
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in _READERS and file.is_file()
        )
        if not files:
            raise UserError(
                f"data.source={config.source!r} is a folder without any {_SUFFIXES} file: give "
                f"one that has some."
            )
    elif path.suffix.lower() in _READERS:
        files = [path]
    else:
        raise UserError(
            f"data.source={config.source!r} is a kind of file that is not read: give {_SUFFIXES}."
        )
    return (
        document
        for file in files
        for document in _READERS[file.suffix.lower()](file, config.text_field)
    )


def _builtin_documents() -> Iterator[str]:
    """About 5 MB that every Python carries: the documentation of the language and the top-level
    modules of the library.

    Packages are left out: they add much text of the same kind (tests, code tables, GUI tools) and
    differ more between builds.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise UserError(
            "data.source='builtin' needs the module pydoc_data, which this Python lacks: give a "
            "path instead."
        ) from error
    yield from (topics[name] for name in sorted(topics))
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        # _sysconfigdata holds the paths and flags of the machine that built this Python; site
        # customisations do not belong to the library.
        if file.name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize")):
            continue
        try:
            yield file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a module may declare another encoding; the corpus does not need it


def _text_documents(path: Path, text_field: str) -> Iterator[str]:
    """The whole file."""
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.source: {path} is not UTF-8 text (byte {error.start}): convert or remove it."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _jsonl_documents(path: Path, text_field: str) -> Iterator[str]:
    """The text of the object on each line; blank lines are ignored."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"data.source: line {number} of {path} is not valid JSON ({error}): correct "
                    f"or remove it."
                ) from error
            fields = row if isinstance(row, dict) else {}
            yield _text(fields, text_field, f"line {number} of {path}")


def _parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    """The text of each row."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(
            f"data.source: {path} needs the `pyarrow` package: pip install pyarrow."
        ) from error
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise _no_field(text_field, str(path), file.schema_arrow.names)
            for rows in file.iter_batches(columns=[text_field]):
                for row in rows.to_pylist():
                    number += 1
                    yield _text(row, text_field, f"row {number} of {path}")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def _hub_documents(config: DataConfig) -> Iterator[str]:
    """The rows of a Hugging Face dataset; `datasets` has its own cache."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f"data.source={config.source!r} needs the `datasets` package: pip install datasets."
        ) from error
    try:
        rows: Any = datasets.load_dataset(config.source.removeprefix("hf:"), split=config.split)
    except Exception as error:  # network, name or split: errors of many kinds, with no common base
        raise UserError(
            f"data.source={config.source!r} with data.split={config.split!r} cannot be loaded "
            f"({_cause(error)}): "
            "check both names, and the network."
        ) from error
    if config.text_field not in rows.column_names:
        raise _no_field(config.text_field, config.source, rows.column_names)
    for number, row in enumerate(rows, start=1):
        yield _text(row, config.text_field, f"row {number} of {config.source}")


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _text_documents,
    ".md": _text_documents,
    ".py": _text_documents,
    ".jsonl": _jsonl_documents,
    ".parquet": _parquet_documents,
}
_SUFFIXES = ", ".join(_READERS)


def _text(row: dict[str, Any], text_field: str, where: str) -> str:
    """The text of the row, with "?" for what UTF-8 cannot hold (lone surrogates in JSON)."""
    if text_field not in row:
        raise _no_field(text_field, where, list(row))
    text = row[text_field]
    if not isinstance(text, str):
        raise UserError(
            f"data.text_field={text_field!r} is not text in {where} ({type(text).__name__}): name "
            f"a field of text, or correct it."
        )
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _no_field(text_field: str, where: str, names: list[str]) -> UserError:
    return UserError(
        f"data.text_field={text_field!r} is not a field of {where}: it has "
        f"{', '.join(map(str, names)) or 'no fields'}."
    )


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"data.source: {path} cannot be read ({_cause(error)}): repair or remove it.")


def _cause(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
