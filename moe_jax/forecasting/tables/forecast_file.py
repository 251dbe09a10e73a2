"""From a file of series to a file of their forecasts and a picture, piece by piece."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from moe_jax.errors import UserError
from moe_jax.forecasting.forecaster import Forecaster
from moe_jax.forecasting.tables.frames import (
    ForecastSettings,
    FutureCovariates,
    ItemForecast,
    forecast_frame,
    forecast_items,
)
from moe_jax.forecasting.tables.items import regular_items
from moe_jax.forecasting.tables.read import Columns, read_frame, read_series
from moe_jax.forecasting.tables.steps import Steps, named_steps
from moe_jax.utils.files import PART

MOST_DRAWN = 6
_WRITTEN_AT_ONCE = 256  # items


class FileForecast(NamedTuple):
    """What was done."""

    items: int
    drawn: list[ItemForecast]
    """The first few."""
    ignored: tuple[str, ...]
    """Covariates that the model does not read."""
    remarks: tuple[str, ...]
    """Sentences that whoever asked should know."""


def forecast_file(
    open_model: Callable[[Steps], Forecaster],
    path: Path,
    out: Path | None,
    settings: ForecastSettings,
    *,
    horizon: int | None = None,
    columns: Columns,
    layout: str = "auto",
    future: Path | None = None,
    freq: str | None = None,
    fill_gaps: bool = False,
) -> FileForecast:
    """Forecasts the series of a CSV or parquet file into another, or as CSV to stdout.

    Without a horizon it is the one that the model was trained for. The table is read, and its first
    item checked, before `open_model` is called, with its steps.

    Raises UserError for a table that cannot be forecast; then there is no file.
    """
    table = read_series(path, columns, layout)
    covariates = None
    if future is not None:
        covariates = FutureCovariates(
            read_frame(future, table.columns), table.columns, table.covariates, str(future)
        )
    given = None if freq is None else named_steps(freq)
    items = regular_items(table.items, given, fill_gaps=fill_gaps)
    first = next(items)  # a table without any is refused where it is read
    forecaster = open_model(first.steps)
    trained = forecaster.prediction_length
    if (steps := horizon or trained) is None:
        raise UserError("--horizon is missing, and the model has none of its own.")
    settings = settings._replace(horizon=steps)
    forecasts = forecast_items(forecaster, itertools.chain([first], items), settings, covariates)
    drawn: list[ItemForecast] = []
    count = 0
    with _table_writer(out) as write:
        while batch := list(itertools.islice(forecasts, _WRITTEN_AT_ONCE)):
            write(forecast_frame(batch, table.columns, settings.levels))
            drawn += batch[: MOST_DRAWN - len(drawn)]
            count += len(batch)
    ignored = () if forecaster.multivariate else table.covariates
    return FileForecast(count, drawn, ignored, tuple(_remarks(steps, trained)))


def _remarks(horizon: int, trained: int | None) -> Iterator[str]:
    if trained is not None and horizon > trained:
        yield (
            f"The model forecasts {trained} steps at once; those after them follow from its own "
            f"forecasts and are less certain than they look."
        )


@contextlib.contextmanager
def _table_writer(out: Path | None) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Writes frames one below another; the file has its name when all are in it."""
    if out is None:
        yield _csv_writer(sys.stdout)
        return
    part = out.with_name(out.name + PART)
    try:
        if out.suffix == ".parquet":
            with _parquet_writer(part) as write:
                yield write
        else:
            with part.open("w", encoding="utf-8", newline="") as file:
                yield _csv_writer(file)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def _csv_writer(file: Any) -> Callable[[pd.DataFrame], None]:
    header = iter([True])
    return lambda frame: frame.to_csv(file, index=False, header=next(header, False))


@contextlib.contextmanager
def _parquet_writer(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(f"--out {path.stem} needs the `pyarrow` package: write CSV.") from error
    with contextlib.ExitStack() as stack:
        writers: list[Any] = []

        def write(frame: pd.DataFrame) -> None:
            table = pyarrow.Table.from_pandas(frame, preserve_index=False)
            if not writers:
                opened = pyarrow.parquet.ParquetWriter(path, table.schema)
                writers.append(stack.enter_context(opened))
            writers[0].write_table(table.cast(writers[0].schema))

        yield write
