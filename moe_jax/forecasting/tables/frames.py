"""Forecasts as frames: exactly the columns of `predict_df` of Chronos' pipelines.

forecast = predict_df(load_forecaster("amazon/chronos-2"), frame, prediction_length=24)
# item_id, timestamp, target_name, predictions, 0.1, ..., 0.9
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe_jax.errors import UserError
from moe_jax.forecasting.forecaster import Forecaster
from moe_jax.forecasting.metrics import PAPER_LEVELS
from moe_jax.forecasting.tables.items import RegularItem, SeriesItem, regular_items
from moe_jax.forecasting.tables.read import (
    Columns,
    items_of_long,
    numbers_of,
    require_columns,
)
from moe_jax.forecasting.tables.steps import named_steps

MOST_STEPS = 1_000_000


class ForecastSettings(NamedTuple):
    """How the items of a table are continued."""

    horizon: int = 0
    levels: tuple[float, ...] = PAPER_LEVELS
    batch_size: int = 256
    """Items that are read and computed together."""
    num_samples: int | None = None
    seed: int = 0


class ItemForecast(NamedTuple):
    """The forecast of an item."""

    item: SeriesItem
    times: pd.Index
    """[H]"""
    quantiles: np.ndarray
    """[targets, H, levels]"""
    predictions: np.ndarray
    """[targets, H]: the model's point forecasts."""


def predict_df(
    forecaster: Forecaster,
    df: pd.DataFrame,
    future_df: pd.DataFrame | None = None,
    *,
    id_column: str = "item_id",
    timestamp_column: str = "timestamp",
    target: str | Sequence[str] = "target",
    prediction_length: int | None = None,
    quantile_levels: Sequence[float] = PAPER_LEVELS,
    batch_size: int = 256,
    freq: str | None = None,
    fill_gaps: bool = False,
    num_samples: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The next values of each item of a long frame.

    Args:
      forecaster: any; those that are not multivariate read one target and no covariates.
      df: a row for each time of each item: id, time, targets, and in other columns covariates.
      future_df: covariates of the next `prediction_length` times of each item.
      prediction_length: by default the one that the model was trained for.
      freq: of pandas; by default it is inferred, and one that is given is not compared.
      fill_gaps: rows that are missing are missing values, and no error.

    Returns the columns id, time, `target_name`, `predictions` and one per level, such as "0.1":
    items in the order in which they first appear, all targets of an item one after another.

    Raises UserError, with the item and the row, for what cannot be forecast.
    """
    targets = (target,) if isinstance(target, str) else tuple(target)
    columns = Columns(id_column, timestamp_column, targets)
    wanted = {"id_column": (id_column,), "timestamp_column": (timestamp_column,)}
    require_columns("the frame", df.columns, {**wanted, "target": targets})
    horizon = prediction_length or forecaster.prediction_length
    if horizon is None:
        raise UserError("prediction_length is missing, and the model has none of its own.")
    items = regular_items(
        items_of_long([df], columns, "the frame"),
        None if freq is None else named_steps(freq),
        fill_gaps=fill_gaps,
    )
    future = None
    if future_df is not None:
        known = [name for name in df.columns if name not in (id_column, timestamp_column)]
        future = FutureCovariates(future_df, columns, known, "the future frame")
    settings = ForecastSettings(horizon, tuple(quantile_levels), batch_size, num_samples, seed)
    forecasts = forecast_items(forecaster, items, settings, future)
    return pd.concat(
        [forecast_frame([one], columns, settings.levels) for one in forecasts], ignore_index=True
    )


class FutureCovariates:
    """What is known of the times to come, by item."""

    def __init__(self, frame: pd.DataFrame, columns: Columns, known: Sequence[str], where: str):
        """Raises UserError for columns that are missing, are targets, or are not in the past."""
        assert columns.timestamp is not None and columns.targets is not None
        wanted = {"timestamp_column": (columns.timestamp,)}
        if columns.id is not None:
            wanted["id_column"] = (columns.id,)
        require_columns(where, frame.columns, wanted)
        own = [name for name in frame.columns if name not in (columns.id, columns.timestamp)]
        for name in own:
            if name in columns.targets:
                raise UserError(f"{where} has the target {name!r}: it may have covariates alone.")
            if name not in known:
                raise UserError(
                    f"{where} has the covariate {name!r}, of which the past is not known: add it "
                    f"to the table of the past, or leave it out."
                )
        if not own:
            raise UserError(f"{where} has no covariate: leave it out.")
        self._where = where
        # Targets are required of items and there are none: the first covariate is not one, so that
        # text may be in it, and the item has a target of zeros.
        frame = frame.assign(**{_NOTHING: 0.0})
        items = items_of_long([frame], columns._replace(targets=(_NOTHING,)), where, single=None)
        with _said_of(where):
            self._items = {item.name: item for item in items}
        self._single = columns.id is None

    def of(self, item: SeriesItem, times: pd.Index) -> dict[str, np.ndarray]:
        """The covariates [H] of an item by name. Raises UserError where its times are others."""
        own = self._items.pop(None if self._single else item.name, None)
        if own is None:
            raise UserError(f"{self._where} has no rows of item {item.name!r}: add {len(times)}.")
        if len(own.times) != len(times):
            raise UserError(
                f"{self._where} has {len(own.times)} rows of item {item.name!r} (from row "
                f"{own.rows[0]}), and the horizon is {len(times)}: give as many."
            )
        if (wrong := np.flatnonzero(np.asarray(own.times != times))).size:
            place = int(wrong[0])
            raise UserError(
                f"{self._where} has item {item.name!r} at {own.times[place]} in row "
                f"{own.rows[place]}, where the forecast is for {times[place]}: correct it."
            )
        covariates = dict(own.covariates)
        for name, values in covariates.items():
            if item.covariates[name].dtype != object:  # as in the past, so in the future
                with _said_of(self._where):
                    column = pd.Series(values)
                    covariates[name] = numbers_of(column, item.name, own.rows, name)
        return covariates

    def require_all_used(self) -> None:
        """Raises UserError where there are items of which the past has none."""
        if self._items:
            item = next(iter(self._items.values()))
            raise UserError(
                f"{self._where} has item {item.name!r} in row {item.rows[0]}, which has no past: "
                f"remove its rows."
            )


_NOTHING = "\0nothing"


@contextmanager
def _said_of(where: str) -> Iterator[None]:
    """Errors that name a row say of which table it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def forecast_items(
    forecaster: Forecaster,
    items: Iterable[RegularItem],
    settings: ForecastSettings,
    future: FutureCovariates | None = None,
) -> Iterator[ItemForecast]:
    """The forecasts of items, which are read `batch_size` at a time.

    Raises UserError for several targets or covariates to come that the model does not take, and for
    a horizon of more than `MOST_STEPS` or beyond the calendar.
    """
    if settings.horizon > MOST_STEPS:
        raise UserError(
            f"prediction_length={settings.horizon} is more than the {MOST_STEPS:,} steps that are "
            f"forecast at most: give less."
        )
    done = 0
    unread = iter(items)
    while batch := list(itertools.islice(unread, settings.batch_size)):
        times = [_times_ahead(one, settings.horizon) for one in batch]
        inputs = [
            _input(forecaster, one.item, own, future) for one, own in zip(batch, times, strict=True)
        ]
        quantiles, means = forecaster.predict_quantiles(
            inputs,
            settings.horizon,
            settings.levels,
            batch_size=settings.batch_size,
            num_samples=settings.num_samples,
            seed=settings.seed,
            first_series=done,
        )
        done += len(batch)
        for one, own, quantile, mean in zip(batch, times, quantiles, means, strict=True):
            shape = (-1, settings.horizon)
            yield ItemForecast(
                one.item,
                own,
                np.asarray(quantile).reshape(*shape, len(settings.levels)),
                np.asarray(mean).reshape(shape),
            )
    if future is not None:
        future.require_all_used()


def _times_ahead(one: RegularItem, horizon: int) -> pd.Index:
    last = one.item.times[-1]
    try:
        return one.steps.after(last, horizon)
    except (OverflowError, ValueError) as error:  # of pandas, whose calendar ends
        raise UserError(
            f"item {one.item.name!r} has the time {last} in row {one.item.rows[-1]}, and "
            f"prediction_length={horizon} steps of {one.steps.name} after it no time can be "
            f"written: give less."
        ) from error


def _input(
    forecaster: Forecaster, item: SeriesItem, times: pd.Index, future: FutureCovariates | None
) -> Any:
    """An item as the model takes it: [T], [targets, T], or a task with covariates."""
    if not forecaster.multivariate:
        if len(item.targets) > 1:
            raise UserError(
                f"target={','.join(item.targets)!r} names {len(item.targets)} columns, and this "
                f"model takes one: name one, or use a Chronos-2 model."
            )
        if future is not None:
            raise UserError(
                "this model reads no covariates, so a future frame has no use: leave it out, or "
                "use a Chronos-2 model."
            )
        return item.target[0]
    if not item.covariates:
        return item.target
    task: dict[str, Any] = {"target": item.target, "past_covariates": item.covariates}
    if future is not None:
        task["future_covariates"] = future.of(item, times)
    return task


def forecast_frame(
    forecasts: Sequence[ItemForecast], columns: Columns, levels: Sequence[float]
) -> pd.DataFrame:
    """Their rows. A table without ids has the column item_id all the same."""
    parts = []
    for item, times, quantiles, predictions in forecasts:
        for number, target in enumerate(item.targets):
            rows = {
                columns.id or "item_id": [item.name] * len(times),
                columns.timestamp or "timestamp": times,
                "target_name": target,
                "predictions": predictions[number],
            }
            rows |= {str(level): quantiles[number, :, q] for q, level in enumerate(levels)}
            parts.append(pd.DataFrame(rows))
    return pd.concat(parts, ignore_index=True)
