"""The documents of `data.source`: the built-in corpus, files and folders, or a hub dataset.

A document is a text or a conversation. The order is fixed, so that the same source gives the same
corpus. A source is read in pieces of about `PIECE_BYTES` bytes, each of which a process can read by
itself. In a folder, files of other kinds and folders behind links are passed over; hidden files and
folders too: editors, desktops and version control keep copies there that nobody meant as text. A
line says so. A file of a known kind that cannot be read is refused by its name and, if it has
lines, the line.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config.schema import DataConfig
from moe_jax.data.chat_template import without_surrogates
from moe_jax.data.parquet import open_parquet
from moe_jax.errors import UserError
from moe_jax.utils.files import PART, local_path, read_characters
from moe_jax.utils.progress import say

# Fields that hold a conversation, where a row has no `data.text_field`.
_CONVERSATIONS = ("messages", "conversations")
_BUILTIN_BYTES = 5_000_000  # about
_SHARED = {"human": "user", "gpt": "assistant"}  # roles in the files of ShareGPT


# Bytes of a source from which a piece is made; a text file and a row group are never divided.
PIECE_BYTES = 32 << 20


class Line(NamedTuple):
    """A line of a file whose lines are counted from the first that begins at or after a byte."""

    path: Path
    begin: int
    number: int

    def __str__(self) -> str:
        with self.path.open("rb") as file:  # counted only for those who read it
            file.seek(max(self.begin - 1, 0))
            end = self.begin - 1 + len(file.readline()) if self.begin else 0
            file.seek(0)
            before = 0
            while (left := end - file.tell()) > 0:
                before += file.read(min(left, 1 << 24)).count(b"\n")
        return f"line {before + self.number} of {self.path}"


class ChatDocument(NamedTuple):
    """A conversation, for the chat template of a tokenizer."""

    messages: list[dict[str, Any]]
    """Each has a `role` and its `content`."""
    where: str | Line
    """Where it was read, for messages."""


Document = str | ChatDocument


class SourcePart(NamedTuple):
    """A part of a source: of a JSONL file the lines that begin at bytes [begin, end), of a large
    parquet file row groups, of a hub dataset rows; other files whole.
    """

    path: str
    begin: int
    end: int
    size: int
    """Bytes that are read."""


class TextSource(NamedTuple):
    """What `data.source` names, not yet read."""

    pieces: list[list[SourcePart]]
    """The same for the same files, whoever asks."""
    identity: list[Any]
    """For JSON. Differs where the content may: the names, sizes and times of its files."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(part.size for piece in self.pieces for part in piece)


def find_source(config: DataConfig) -> TextSource:
    """The files or rows of `data.source`.

    Raises:
      UserError: the source is missing or none that can be read.
    """
    if config.source == "builtin":
        return TextSource([[SourcePart("", 0, 0, _BUILTIN_BYTES)]], ["builtin", sys.version])
    if config.source.startswith("hf:"):
        return _hub_source(config)
    path = local_path(config.source)
    if not os.path.exists(path):  # Path.exists raises where a parent folder may not be entered
        if os.path.exists(f"{path}{PART}"):
            raise UserError(
                f"data.source={config.source!r} is half prepared, in {path}{PART}: run the same "
                f"moe-jax data prepare once more, which goes on where it stopped."
            )
        raise UserError(
            f"data.source={config.source!r} does not exist: use 'builtin', 'hf:NAME', or the path "
            f"of a file or folder."
        )
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise UserError(
                f"data.source={config.source!r} is a folder without any {_SUFFIXES} file that is "
                f"not hidden: give one that has some."
            )
    elif path.suffix.lower() in _READERS:
        files = [path]
    else:
        raise UserError(
            f"data.source={config.source!r} is a kind of file that is not read: give {_SUFFIXES}."
        )
    parts: list[SourcePart] = []
    identity: list[Any] = []
    for file in files:
        status = file.stat()
        identity.append([os.path.relpath(file, path), status.st_size, status.st_mtime_ns])
        parts += _parts(file, status.st_size)
    return TextSource(_pieces(parts), identity)


def read_piece(config: DataConfig, piece: list[SourcePart]) -> Iterator[Document]:
    """The documents of a piece of `data.source`, read lazily; some may be blank.

    Raises:
      UserError: a file cannot be read, or a document lacks `data.text_field`.
    """
    for part in piece:
        if config.source == "builtin":
            yield from _builtin_documents()
        elif config.source.startswith("hf:"):
            yield from _hub_documents(config, part)
        else:
            reader = _READERS[Path(part.path).suffix.lower()]
            yield from reader(Path(part.path), part, config.text_field)


def read_documents(config: DataConfig) -> Iterator[Document]:
    """The documents of the whole of `data.source`; see `find_source` and `read_piece`."""
    pieces = find_source(config).pieces
    return (document for piece in pieces for document in read_piece(config, piece))


def _parts(file: Path, size: int) -> list[SourcePart]:
    """A file in parts of about `PIECE_BYTES` bytes where it can be divided."""
    count = -(-size // PIECE_BYTES)
    if count > 1 and file.suffix.lower() == ".jsonl":
        ends = [min(number * PIECE_BYTES, size) for number in range(count + 1)]
    elif count > 1 and file.suffix.lower() == ".parquet":
        groups = _row_groups(file)
        count = min(count, groups)
        ends = [number * groups // count for number in range(count + 1)]
        return [SourcePart(str(file), a, b, size // count) for a, b in pairwise(ends)]
    else:
        ends = [0, size]
    return [SourcePart(str(file), a, b, b - a) for a, b in pairwise(ends)]


def _pieces(parts: list[SourcePart]) -> list[list[SourcePart]]:
    """Consecutive parts together, as long as they have no more than `PIECE_BYTES` bytes."""
    pieces: list[list[SourcePart]] = []
    room = 0
    for part in parts:
        if not pieces or part.size > room:
            pieces.append([])
            room = PIECE_BYTES
        pieces[-1].append(part)
        room -= part.size
    return pieces


def _files_below(folder: Path) -> list[Path]:
    """The files of known kinds in a folder and those below it. What is passed over is said.

    Raises UserError for a link of such a name that leads nowhere.
    """
    files, hidden, other, linked = [], [], [], []
    for path in sorted(folder.rglob("*")):
        known = path.suffix.lower() in _READERS
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            if known and path.is_file():
                hidden.append(path)
        elif path.is_dir():
            if path.is_symlink():  # rglob does not enter it: it may lead back
                linked.append(path)
        elif known and path.is_symlink() and not path.exists():
            raise UserError(
                f"data.source: {path} is a link to {os.readlink(path)}, which is not there: repair "
                f"or remove it."
            )
        elif known and path.is_file():
            files.append(path)
        else:
            other.append(path)
    for what, passed in (
        ("hidden files", hidden),
        (f"files other than {_SUFFIXES}", other),
        ("linked folders", linked),
    ):
        if passed:
            more = f" and {len(passed) - 1:,} more" if len(passed) > 1 else ""
            say(f"data.source: {what} are passed over: {passed[0]}{more}.")
    return files


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


def _text_documents(path: Path, part: SourcePart, text_field: str) -> Iterator[str]:
    """The whole file."""
    try:
        yield read_characters(path)
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.source: {path} is not UTF-8 text (byte {error.start}): convert or remove it."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _jsonl_documents(path: Path, part: SourcePart, text_field: str) -> Iterator[Document]:
    """The text or conversation of the object on each line; blank lines are ignored."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        position, number = part.begin, 0
        if position:  # a line belongs to the part in which it begins
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < part.end and (line := file.readline()):
            position += len(line)
            number += 1
            if not line.strip():
                continue
            where = Line(path, part.begin, number)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"data.source: {where} is not valid JSON ({error}): correct or remove it."
                ) from error
            yield _document(row if isinstance(row, dict) else {}, text_field, where)


def _parquet_documents(path: Path, part: SourcePart, text_field: str) -> Iterator[Document]:
    """The text or conversation of each row."""
    with open_parquet(path, _unreadable) as file:
        field = _field(file.schema_arrow.names, text_field, str(path))
        whole = part.size == path.stat().st_size
        groups = range(file.num_row_groups) if whole else range(part.begin, part.end)
        number = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
        for rows in file.iter_batches(columns=[field], row_groups=list(groups)):
            for row in rows.to_pylist():
                number += 1
                yield _document(row, field, f"row {number} of {path}")


def _row_groups(path: Path) -> int:
    with open_parquet(path, _unreadable) as file:
        return file.num_row_groups


def _load_hub(config: DataConfig) -> Any:
    """A Hugging Face dataset; `datasets` has its own cache."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f"data.source={config.source!r} needs the `datasets` package: pip install datasets."
        ) from error
    try:
        return datasets.load_dataset(config.source.removeprefix("hf:"), split=config.split)
    except Exception as error:  # network, name or split: errors of many kinds, with no common base
        raise UserError(
            f"data.source={config.source!r} with data.split={config.split!r} cannot be loaded "
            f"({_cause(error)}): "
            "check both names, and the network."
        ) from error


def _hub_source(config: DataConfig) -> TextSource:
    rows = _load_hub(config)
    files = [Path(file["filename"]) for file in getattr(rows, "cache_files", ())]
    sizes = [file.stat().st_size for file in files]
    count = min(-(-sum(sizes) // PIECE_BYTES), len(rows)) or 1
    ends = [number * len(rows) // count for number in range(count + 1)]
    parts = [SourcePart("", a, b, sum(sizes) // count) for a, b in pairwise(ends)]
    stamps = [
        [str(file), size, file.stat().st_mtime_ns] for file, size in zip(files, sizes, strict=True)
    ]
    return TextSource([[part] for part in parts], [config.source, config.split, len(rows), stamps])


def _hub_documents(config: DataConfig, part: SourcePart) -> Iterator[Document]:
    """The rows of a part of a dataset."""
    rows = _load_hub(config)
    field = _field(rows.column_names, config.text_field, config.source)
    if (part.begin, part.end) != (0, len(rows)):
        rows = rows.select(range(part.begin, part.end))
    for number, row in enumerate(rows, start=part.begin + 1):
        yield _document(row, field, f"row {number} of {config.source}")


_READERS: dict[str, Callable[[Path, SourcePart, str], Iterator[Document]]] = {
    ".txt": _text_documents,
    ".md": _text_documents,
    ".py": _text_documents,
    ".jsonl": _jsonl_documents,
    ".parquet": _parquet_documents,
}
_SUFFIXES = ", ".join(_READERS)


def _document(row: dict[str, Any], text_field: str, where: str | Line) -> Document:
    """The text of the row, with "?" for what UTF-8 cannot hold (lone surrogates in JSON), or its
    conversation.
    """
    field = _field(list(row), text_field, where)
    value = row[field]
    if isinstance(value, list):
        return ChatDocument([_message(message, field, where) for message in value], where)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(
            f"data.text_field={field!r} is not text in {where} ({kind}): name "
            f"a field of text, or correct it."
        )
    return without_surrogates(value)


def _message(message: Any, field: str, where: str | Line) -> dict[str, Any]:
    """A message as chat templates take it."""
    fields = message if isinstance(message, dict) else {}
    if "from" in fields and "value" in fields:
        role = fields["from"]
        fields = {"role": _SHARED.get(role, role), "content": fields["value"]}
    if not isinstance(fields.get("role"), str) or "content" not in fields:
        raise UserError(
            f"{where}: its field {field!r} holds something other than messages, each with a role "
            f"and its content: correct it, or name another field in data.text_field."
        )
    # Parquet has a null where another row has a value.
    return {key: value for key, value in fields.items() if value is not None or key == "content"}


def _field(names: list[str], text_field: str, where: str | Line) -> str:
    """The field to read of those that are there. Raises UserError where none is."""
    for name in (text_field, *_CONVERSATIONS):
        if name in names:
            return name
    raise UserError(
        f"data.text_field={text_field!r} is not a field of {where}: it has "
        f"{', '.join(map(str, names)) or 'no fields'}."
    )


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"data.source: {path} cannot be read ({_cause(error)}): repair or remove it.")


def _cause(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
