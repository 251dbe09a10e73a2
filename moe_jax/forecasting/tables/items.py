"""The series of a table, checked one by one: what is wrong is said with the item and the row.

A row's number counts from 1, without a header.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe_jax.errors import UserError
from moe_jax.forecasting.tables.steps import Steps, inferred_steps, usual_steps

_LARGEST = float(np.finfo(np.float32).max)


class SeriesItem(NamedTuple):
    """A series, or several targets of one item, with covariates."""

    name: Any
    times: pd.Index
    """Ascending: times, or whole numbers that count steps."""
    rows: np.ndarray
    """The number of each value's row in the table."""
    targets: dict[str, np.ndarray]
    """f64 [T] by column; NaN where a value is missing."""
    covariates: dict[str, np.ndarray]
    """By column [T]: f64, or objects for text and truth values."""

    @property
    def target(self) -> np.ndarray:
        """[targets, T]."""
        return np.stack(list(self.targets.values()))


class RegularItem(NamedTuple):
    """A series whose times are a step apart, or are said to be."""

    item: SeriesItem
    steps: Steps


def checked_item(item: SeriesItem, hint: str = "") -> SeriesItem:
    """The item. Raises UserError where times are not ascending (with the hint), a value is
    infinite, or none is there.
    """
    times = item.times.to_numpy()
    if (wrong := np.flatnonzero(times[1:] <= times[:-1])).size:
        place = int(wrong[0]) + 1
        what = (
            f"has the time {item.times[place]} twice, in rows {item.rows[place - 1]} and "
            f"{item.rows[place]}: remove one of them"
            if times[place] == times[place - 1]
            else f"goes back in time in row {item.rows[place]}, from {item.times[place - 1]} to "
            f"{item.times[place]}: sort its rows"
        )
        raise UserError(f"item {item.name!r} {what}{hint}.")
    numbers = {name: values for name, values in item.covariates.items() if values.dtype != object}
    for name, values in (item.targets | numbers).items():
        if (wrong := np.flatnonzero(np.abs(values) > _LARGEST)).size:
            place = int(wrong[0])
            raise UserError(
                f"item {item.name!r} has {values[place]:g} in row {item.rows[place]}, column "
                f"{name!r}, and infinities and what is beyond f32 cannot be forecast: leave the "
                f"cell empty, or scale the series."
            )
    for name, values in item.targets.items():
        if np.isnan(values).all():
            raise UserError(
                f"item {item.name!r} has no value in column {name!r} (its first row is "
                f"{item.rows[0]}): leave it out."
            )
    return item


def regular_items(
    items: Iterable[SeriesItem], given: Steps | None = None, *, fill_gaps: bool = False
) -> Iterator[RegularItem]:
    """The items with the steps they share; items too short to tell have those of the others.

    Steps that are given are not compared with the times. With `fill_gaps` rows that are missing
    become missing values.

    Raises UserError for a gap, for two frequencies, and where no item has three times to tell it.
    (Whole numbers need two; alone, each counts one step.)
    """
    steps, first, waiting = given, None, []
    for item in items:
        if given is not None and not _has_dates(item):
            raise UserError(
                f"item {item.name!r} has whole numbers for times (row {item.rows[0]}), which count "
                f"steps: leave freq out, or write dates."
            )
        if steps is None:
            steps = _steps_of(item)
            first = item
            if steps is None:
                waiting.append(item)
                continue
        for earlier in waiting:
            yield RegularItem(_regular(earlier, steps, first, fill_gaps), steps)
        waiting = []
        if given is None or fill_gaps:
            item = _regular(item, steps, first, fill_gaps)
        yield RegularItem(item, steps)
    if waiting and not _has_dates(waiting[0]):
        yield from (RegularItem(item, Steps(1)) for item in waiting)
    elif waiting:
        raise UserError(
            f"item {waiting[0].name!r} (row {waiting[0].rows[0]}) has {len(waiting[0].times)} of "
            f"the three times that tell a frequency, and no item has more: give freq."
        )


def _has_dates(item: SeriesItem) -> bool:
    return isinstance(item.times, pd.DatetimeIndex)


def _steps_of(item: SeriesItem) -> Steps | None:
    """The steps of an item with enough times to tell. Raises UserError for one without any."""
    if len(item.times) < (3 if _has_dates(item) else 2):
        return None
    steps = inferred_steps(item.times) or usual_steps(item.times)
    if steps is None:
        raise UserError(
            f"item {item.name!r} has no equal steps of time (rows {item.rows[0]} to "
            f"{item.rows[-1]}): give freq, or put its values on a regular grid."
        )
    return steps


def _regular(
    item: SeriesItem, steps: Steps, first: SeriesItem | None, fill_gaps: bool
) -> SeriesItem:
    """The item, which has these steps. Raises UserError where it has not."""
    if isinstance(steps.offset, int) == _has_dates(item):
        raise UserError(
            f"item {item.name!r} has times of another kind, from row {item.rows[0]}, than items "
            f"before it: write all as dates, or all as whole numbers."
        )
    place = steps.first_irregular(item.times)
    if place is None:
        return item
    if fill_gaps:
        return _filled(item, steps)
    own = inferred_steps(item.times)
    if own is not None and first is not None and own != steps:
        raise UserError(
            f"item {item.name!r} has steps of {own.name} from row {item.rows[0]}, and item "
            f"{first.name!r} of {steps.name}: forecast them one frequency at a time."
        )
    before, after = item.times[place - 1], item.times[place]
    if after < steps.after(before, 1)[0]:
        raise UserError(
            f"item {item.name!r} has {after} in row {item.rows[place]}, less than a step of "
            f"{steps.name} after {before}: put its values on a regular grid."
        )
    raise UserError(
        f"item {item.name!r} has a gap before row {item.rows[place]}: {after} follows {before}, "
        f"and its steps are {steps.name}; add the missing rows with an empty target, or give "
        f"fill_gaps."
    )


def _filled(item: SeriesItem, steps: Steps) -> SeriesItem:
    """The item on the grid of its steps, with missing values where there were no rows."""
    grid = steps.between(item.times[0], item.times[-1])
    places = grid.get_indexer(item.times)
    if (wrong := np.flatnonzero(places < 0)).size:
        place = int(wrong[0])
        raise UserError(
            f"item {item.name!r} has the time {item.times[place]} in row {item.rows[place]}, which "
            f"is not on the grid of {steps.name} from {item.times[0]}: correct it."
        )

    def spread(values: np.ndarray) -> np.ndarray:
        missing = None if values.dtype == object else np.nan
        whole = np.full(len(grid), missing, values.dtype)
        whole[places] = values
        return whole

    rows = np.zeros(len(grid), np.int64)
    rows[places] = item.rows
    return SeriesItem(
        item.name,
        grid,
        np.maximum.accumulate(rows),  # a filled one is said to be in the row before it
        {name: spread(values) for name, values in item.targets.items()},
        {name: spread(values) for name, values in item.covariates.items()},
    )
