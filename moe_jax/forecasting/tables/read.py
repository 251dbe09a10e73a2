"""Tables of series, read: CSV or parquet, in one of three layouts.

| layout | a row is |
|---|---|
| long | a time of an item: its id, the time, targets, covariates |
| wide | a time of all items: the time in the first column, then a column per item |
| rows | an item without times: its id, then its values, as the files of the M4 competition |

Long and rows are read piece by piece, so a file of any number of series takes the memory of a few.
(Of a long file in which items are mixed, sorted by time for example, the whole is needed; it may
have `WHOLE_BYTES`.)
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe_jax.data.parquet import open_parquet
from moe_jax.errors import UserError
from moe_jax.forecasting.tables.items import SeriesItem, checked_item

LAYOUTS = ("auto", "long", "wide", "rows")
WHOLE_BYTES = 256 << 20
_PIECE_ROWS = 200_000
_NAMELESS = re.compile(r"Unnamed: \d+|__index_level_\d+__")
TARGET = "target"


class Columns(NamedTuple):
    """The names of columns in a table; None for one that was not given."""

    id: str | None = None
    timestamp: str | None = None
    targets: tuple[str, ...] | None = None


class SeriesTable(NamedTuple):
    """The series of a table, of which the items are read once, as they are asked for."""

    columns: Columns
    """As they are, or as a frame of forecasts is to name them."""
    covariates: tuple[str, ...]
    items: Iterator[SeriesItem]


def read_series(path: Path, columns: Columns, layout: str = "auto") -> SeriesTable:
    """The series of a file.

    In the layout `auto` a table with the column of ids is long; one without it is a single item,
    called like the file, if it has the targets' columns, and else wide.

    Raises UserError for a file that is none, for columns that are missing, and, while its items are
    read, for what `checked_item` refuses.
    """
    if layout == "rows":
        return SeriesTable(_named(columns), (), _items_of_rows(path))
    names = _column_names(path)
    layout, columns = _settled(path, names, columns, layout)
    if layout == "wide":
        time = columns.timestamp if columns.timestamp in names else names[0]
        own = columns.targets or tuple(name for name in names if name != time)
        columns = columns._replace(targets=None)
        frame = _whole(path, {})[[time, *own]]
        return SeriesTable(_named(columns), (), _items_of_wide(path, frame))
    whole = path.stat().st_size <= WHOLE_BYTES
    text = {} if columns.id is None else {columns.id: str}
    pieces = [_whole(path, text)] if whole else _pieces(path, text)
    items = items_of_long(pieces, columns, str(path), single=path.stem)
    return SeriesTable(columns, _covariates(names, columns), items)


def read_frame(path: Path, columns: Columns) -> pd.DataFrame:
    """A long table as a whole, ids as text where it is CSV."""
    _column_names(path)  # says what is wrong with the file
    return _whole(path, {} if columns.id is None else {columns.id: str})


def _named(columns: Columns) -> Columns:
    """What a table is given whose own columns have other names."""
    return Columns(
        columns.id or "item_id", columns.timestamp or "timestamp", columns.targets or (TARGET,)
    )


def _covariates(names: Sequence[str], columns: Columns) -> tuple[str, ...]:
    """All other columns that have a name: pandas gives one to an index that was written too."""
    own = {columns.id, columns.timestamp, *(columns.targets or ())}
    return tuple(name for name in names if name not in own and not _NAMELESS.fullmatch(name))


def _settled(path: Path, names: list[str], columns: Columns, layout: str) -> tuple[str, Columns]:
    """The layout, and of a long table its columns; one with a single item has no ids."""
    id_column, targets = columns.id or "item_id", columns.targets or (TARGET,)
    single = columns.id is None and id_column not in names
    if layout == "auto":
        layout = "wide" if single and not {*targets} & {*names} else "long"
    if layout == "wide":
        if columns.targets is not None:
            require_columns(str(path), names, {"target": columns.targets})
        return layout, columns
    timestamp = columns.timestamp
    if timestamp is None:
        first = names[0] if single and names[0] not in targets else "timestamp"
        timestamp = "timestamp" if "timestamp" in names else first
    wanted = {"timestamp_column": (timestamp,), "target": targets}
    if not single:
        wanted = {"id_column": (id_column,), **wanted}
    require_columns(str(path), names, wanted)
    return layout, Columns(None if single else id_column, timestamp, targets)


def require_columns(
    where: str, names: Iterable[Any], wanted: Mapping[str, tuple[str, ...]]
) -> None:
    """Raises UserError for the first column that a table lacks, with what names it."""
    names = list(names)
    for setting, own in wanted.items():
        for name in own:
            if name not in names:
                raise UserError(
                    f"{where} has no column {name!r}: name another with {setting}; it has "
                    f"{', '.join(map(str, names[:12]))}{' and more' if len(names) > 12 else ''}."
                )


# Files


def _column_names(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path} is no file: give a CSV or parquet file of series.")
    if _is_parquet(path):
        with open_parquet(path, _unreadable) as file:
            return _parquet_names(path, file.schema_arrow)
    with _explained(path):
        names = list(pd.read_csv(path, nrows=0).columns)
        written = pd.read_csv(path, nrows=1, header=None, dtype=str).iloc[0].dropna()
    _require_one_of_each(path, written)  # pandas gives the second of a name another one
    return [str(name) for name in names]


def _parquet_names(path: Path, schema: Any) -> list[str]:
    """The columns, those first that were the index of a frame, which pandas writes last."""
    _require_one_of_each(path, schema.names)
    for field in schema:
        if field.type.num_fields:
            raise UserError(
                f"{path} has {field.type} in each cell of column {field.name!r}: write a value per "
                f"row, or leave the column out."
            )
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    first = [name for name in index if name in schema.names]
    return first + [name for name in schema.names if name not in first]


def _require_one_of_each(path: Path, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{path} has two columns {name!r}: rename one of them.")
        seen.add(name)


def _whole(path: Path, types: dict[str, Any]) -> pd.DataFrame:
    """All rows. Raises UserError where there is none."""
    pieces = [*_pieces(path, types)]
    if not sum(map(len, pieces)):
        raise UserError(f"{path} has no rows.")
    return pd.concat(pieces)


def _pieces(path: Path, types: dict[str, Any]) -> Iterator[pd.DataFrame]:
    """The rows in turn, of all columns in the order of `_column_names`."""
    if _is_parquet(path):
        with open_parquet(path, _unreadable) as file:
            names = _parquet_names(path, file.schema_arrow)
            for batch in file.iter_batches(_PIECE_ROWS):
                yield batch.to_pandas(ignore_metadata=True)[names]
        return
    with _explained(path), pd.read_csv(path, chunksize=_PIECE_ROWS, dtype=types) as reader:
        for piece in reader:
            if not isinstance(piece.index, pd.RangeIndex):
                raise UserError(f"{path} has more cells in a row than in its header: correct it.")
            yield piece


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What pandas and whatever decompresses for it raise, which has no common base, as a
    UserError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    cause = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
    return UserError(f"{path} cannot be read as a table ({cause}): give CSV or parquet.")


# Long


def items_of_long(
    pieces: Iterable[pd.DataFrame], columns: Columns, where: str, *, single: Any = None
) -> Iterator[SeriesItem]:
    """The items of a long table in the order in which they first appear; without a column of ids
    there is one, called `single`. Within a piece, and there alone, the rows of items may be mixed.
    """
    hint = (
        ""
        if columns.id is not None
        else "; its rows are taken for one item, as no id_column is given"
    )
    rest: pd.DataFrame | None = None
    seen: set[Any] = set()
    count = 0
    for piece in pieces:
        piece = piece.assign(**{_ROW: np.arange(count + 1, count + 1 + len(piece))})
        count += len(piece)
        piece = piece if rest is None else pd.concat([rest, piece])
        *whole, (_, rest) = _groups(piece, columns, where)
        for name, rows in whole:
            yield _long_item(name, rows, columns, seen, single, hint)
    if rest is None or rest.empty:
        raise UserError(f"{where} has no rows.")
    name = None if columns.id is None else rest[columns.id].iloc[0]
    yield _long_item(name, rest, columns, seen, single, hint)


_ROW = "\0row"


def _groups(piece: pd.DataFrame, columns: Columns, where: str) -> list[tuple[Any, pd.DataFrame]]:
    """The rows of each item; the last may go on in the next piece."""
    if columns.id is None or piece.empty:
        return [(None, piece)]
    codes, names = pd.factorize(piece[columns.id])
    if (codes < 0).any():
        row = piece[_ROW].to_numpy()[np.argmax(codes < 0)]
        raise UserError(f"{where} has no {columns.id!r} in row {row}: fill it in.")
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(names) + 1))
    piece = piece if (np.diff(codes) >= 0).all() else piece.iloc[order]
    return [
        (name, piece.iloc[begin:end])
        for name, begin, end in zip(names, bounds[:-1], bounds[1:], strict=True)
    ]


def _long_item(
    name: Any, rows: pd.DataFrame, columns: Columns, seen: set[Any], single: Any, hint: str
) -> SeriesItem:
    numbers = rows[_ROW].to_numpy()
    if columns.id is None:
        name = single
    elif name in seen:
        raise UserError(
            f"item {name!r} goes on in row {numbers[0]} after other items: sort the file by item, "
            f"because one of its size is read piece by piece."
        )
    seen.add(name)
    assert columns.timestamp is not None and columns.targets is not None
    times = _times(rows[columns.timestamp], name, numbers)
    targets = {
        target: numbers_of(rows[target], name, numbers, target) for target in columns.targets
    }
    names = _covariates([c for c in rows.columns if c != _ROW], columns)
    covariates = {other: _covariate(rows[other]) for other in names}
    return checked_item(SeriesItem(name, times, numbers, targets, covariates), hint)


def _times(values: pd.Series, name: Any, rows: np.ndarray) -> pd.Index:
    """Times, or the whole numbers that count steps."""
    if pd.api.types.is_integer_dtype(values.dtype):
        return pd.Index(values.to_numpy(np.int64))
    if pd.api.types.is_datetime64_any_dtype(values.dtype):
        times = pd.DatetimeIndex(values)
    elif pd.api.types.is_numeric_dtype(values.dtype):
        times = pd.DatetimeIndex([pd.NaT] * len(values))
    else:
        try:
            with warnings.catch_warnings():  # of formats; what was understood is checked
                warnings.simplefilter("ignore", category=UserWarning)
                times = pd.DatetimeIndex(pd.to_datetime(values, errors="coerce"))
        except (TypeError, ValueError) as error:  # some with a time zone, some without
            raise UserError(
                f"item {name!r} has times of several kinds, in rows {rows[0]} to {rows[-1]}: "
                f"{str(error).rstrip('.')}."
            ) from error
    if (wrong := np.flatnonzero(times.isna())).size:
        place = int(wrong[0])
        raise UserError(
            f"item {name!r} has {_shown(values, place)} for a time in row {rows[place]}: write it "
            f"as 2026-01-31 or 2026-01-31 13:00:00, or as a whole number that counts steps."
        )
    return times


def numbers_of(values: pd.Series, name: Any, rows: np.ndarray, column: str) -> np.ndarray:
    """A column of an item, f64, NaN where a cell is empty. Raises UserError for text."""
    if pd.api.types.is_datetime64_any_dtype(values.dtype):  # pandas counts their nanoseconds
        values = values.astype(str)
    try:
        numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    except TypeError:  # lists and the like
        numbers = np.full(len(values), np.nan)
    wrong = np.flatnonzero(np.isnan(numbers) & values.notna().to_numpy())
    if wrong.size:
        place = int(wrong[0])
        raise UserError(
            f"item {name!r} has {_shown(values, place)} for a number in row {rows[place]}, column "
            f"{column!r}: correct it, or leave the cell empty."
        )
    return numbers


def _shown(values: pd.Series, place: int) -> str:
    """A cell as it would be written in Python."""
    return repr(values.iloc[place : place + 1].tolist()[0])


def _covariate(values: pd.Series) -> np.ndarray:
    numeric = pd.api.types.is_numeric_dtype(values.dtype)
    if (numeric and not pd.api.types.is_bool_dtype(values.dtype)) or values.isna().all():
        return values.to_numpy(np.float64, na_value=np.nan)
    return np.array(
        [
            None if missing else value
            for value, missing in zip(values.tolist(), values.isna(), strict=True)
        ],
        object,
    )


# Wide and rows


def _items_of_wide(path: Path, frame: pd.DataFrame) -> Iterator[SeriesItem]:
    rows = np.arange(1, len(frame) + 1)
    if frame.shape[1] < 2 or frame.empty:
        raise UserError(
            f"{path} has no series: a wide table has times in its first column and an item in each "
            f"of the others."
        )
    times = _times(frame.iloc[:, 0], frame.columns[0], rows)
    for place, name in enumerate(frame.columns[1:], 1):
        column = frame.iloc[:, place]
        values = numbers_of(column, str(name), rows, str(name))
        observed = np.flatnonzero(~np.isnan(values))
        # Items may begin and end at different times: an end is no missing value.
        part = slice(observed[0], observed[-1] + 1) if observed.size else slice(None)
        yield checked_item(
            SeriesItem(str(name), times[part], rows[part], {TARGET: values[part]}, {})
        )


def _read_rows(path: Path) -> Iterator[tuple[int, str, np.ndarray]]:
    """The number, the id and the values f64 [T] of each row. A first row without numbers is a
    header; empty cells at the end belong to no series.

    Raises UserError for a cell that is no number.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: give a CSV file of series.")
    number = 0
    with _explained(path), path.open(newline="", encoding="utf-8-sig") as file:
        for line, (name, *cells) in enumerate(filter(None, csv.reader(file))):
            while cells and not cells[-1].strip():
                cells.pop()
            values = [_number(cell) for cell in cells]
            if line == 0 and all(value is None for value in values):
                continue
            number += 1
            if None in values:
                raise UserError(
                    f"item {name!r} has {cells[values.index(None)]!r} for a number in row {number} "
                    f"of {path}: correct it, or leave the cell empty."
                )
            yield number, name, np.array(values, np.float64)


def _number(cell: str) -> float | None:
    """A cell's value, NaN where it is empty, None where it is no number."""
    try:
        return float(cell) if cell.strip() else np.nan
    except ValueError:
        return None


def _items_of_rows(path: Path) -> Iterator[SeriesItem]:
    seen: set[str] = set()
    number = 0
    for number, name, values in _read_rows(path):
        if not len(values):
            raise UserError(f"item {name!r} in row {number} has no value: leave it out.")
        if name in seen:
            raise UserError(f"item {name!r} is there twice, again in row {number}: rename it.")
        seen.add(name)
        times = pd.Index(np.arange(1, len(values) + 1))
        rows = np.full(len(values), number)
        yield checked_item(SeriesItem(name, times, rows, {TARGET: values}, {}))
    if not number:
        raise UserError(f"{path} has no rows.")
