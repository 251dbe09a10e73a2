"""Equal steps of time: which frequency a series has, where it breaks it, and what comes next.

Times are a `pandas.DatetimeIndex`, or whole numbers, which count steps.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moe_jax.errors import UserError

# By the names of pandas' offsets, without their anchors ("W-SUN" is "W"). Those of gluonts, which
# the published scores are computed with.
_SEASONS = {"s": 3600, "min": 1440, "h": 24, "D": 1, "W": 1, "ME": 12, "MS": 12, "B": 5}
_SEASONS |= {"QE": 4, "QS": 4}
# Where a series has no frequency as a whole, the first part of one of these lengths tells it, long
# ones first: a week of business days looks like days.
_PARTS, _BEGINS = (10, 5, 3), 64


@dataclass(frozen=True)
class Steps:
    """From one time to the next: an offset of pandas, or a whole number."""

    offset: Any

    @property
    def name(self) -> str:
        """As pandas writes the frequency."""
        return str(self.offset) if isinstance(self.offset, int) else self.offset.freqstr

    @property
    def season(self) -> int:
        """The steps of a season by the usual rule: a day of hours, a year of months, 1 for what has
        no season or a step that does not divide it.
        """
        if isinstance(self.offset, int):
            return 1
        whole = _SEASONS.get(self.offset.base.freqstr.split("-")[0], 1)
        return whole // self.offset.n if whole % self.offset.n == 0 else 1

    def after(self, last: Any, count: int) -> pd.Index:
        """The `count` times after `last`. Raises OverflowError or ValueError where the last of them
        cannot be written.
        """
        if isinstance(self.offset, int):
            np.int64(int(last) + self.offset * count)
            return pd.Index(int(last) + self.offset * np.arange(1, count + 1))
        with warnings.catch_warnings():  # offsets like business days are added one by one
            warnings.simplefilter("ignore", category=pd.errors.PerformanceWarning)
            return pd.DatetimeIndex([last + step * self.offset for step in range(1, count + 1)])

    def between(self, first: Any, last: Any) -> pd.Index:
        """All times from `first` to `last`."""
        if isinstance(self.offset, int):
            return pd.Index(np.arange(int(first), int(last) + 1, self.offset))
        return pd.date_range(first, last, freq=self.offset)

    def first_irregular(self, times: pd.Index) -> int | None:
        """The first place whose time is not a step after the one before it."""
        if len(times) < 2:
            return None
        fixed = _fixed(self.offset, times)
        if fixed is not None:
            wrong = np.diff(times.to_numpy()) != fixed
        else:
            grid = pd.date_range(times[0], periods=len(times), freq=self.offset)
            wrong = (grid != times)[1:] if grid[0] == times[0] else np.ones(1, bool)
        return int(np.argmax(wrong)) + 1 if wrong.any() else None


def _fixed(offset: Any, times: pd.Index) -> Any:
    """The offset as a difference of times, where it is always the same."""
    if isinstance(offset, int):
        return offset
    if isinstance(offset, pd.tseries.offsets.Tick):
        return pd.Timedelta(offset).to_timedelta64()
    if isinstance(offset, pd.tseries.offsets.Day) and getattr(times, "tz", None) is None:
        return np.timedelta64(offset.n, "D")
    return None


def named_steps(freq: str) -> Steps:
    """The steps that a frequency of pandas stands for. Raises UserError for what is none."""
    try:
        offset = pd.tseries.frequencies.to_offset(freq)
    except ValueError as error:
        raise UserError(
            f"freq={freq!r} is no frequency: give one of pandas, such as h, 15min, D, W, MS or B."
        ) from error
    if offset.n < 1:
        raise UserError(f"freq={freq!r} does not go forward: give a positive one, such as h.")
    return Steps(offset)


def inferred_steps(times: pd.Index) -> Steps | None:
    """The steps of at least three times, where they are equal."""
    if len(times) < 3:
        return None
    if not isinstance(times, pd.DatetimeIndex):
        differences = np.diff(times.to_numpy())
        same = differences[0] > 0 and (differences == differences[0]).all()
        return Steps(int(differences[0])) if same else None
    with warnings.catch_warnings():  # pandas 4 will give an offset, which is as good
        warnings.simplefilter("ignore")
        freq = pd.infer_freq(times)
    return None if freq is None else Steps(pd.tseries.frequencies.to_offset(freq))


def usual_steps(times: pd.Index) -> Steps | None:
    """The steps of a series that is not regular as a whole: those of its first regular part, or
    else its smallest one, if the others are multiples of it.
    """
    for length in _PARTS:
        for begin in range(min(_BEGINS, len(times) - length + 1)):
            if (steps := inferred_steps(times[begin : begin + length])) is not None:
                return steps
    differences = np.diff(times.to_numpy())
    smallest = differences.min()
    if (differences % smallest).astype(np.int64).any():
        return None
    if isinstance(times, pd.DatetimeIndex):
        return Steps(pd.tseries.frequencies.to_offset(pd.Timedelta(smallest)))
    return Steps(int(smallest))
