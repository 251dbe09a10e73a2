"""Series of different lengths as batches of rows: what comes before a series is NaN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.forecasting.placed_model import rounded


def as_series(inputs: Any) -> list[np.ndarray]:
    """Series f32 [T] from one series, a list of them, or rows [B, T] that NaN fills up in front.

    Raises UserError for values that are infinite, and for what is no series.
    """
    single = isinstance(inputs, np.ndarray) and inputs.ndim == 1
    series = [np.asarray(one, np.float32) for one in ([inputs] if single else inputs)]
    for number, one in enumerate(series):
        if one.ndim != 1:
            raise UserError(
                f"Series {number} has {one.ndim} dims: this model takes series of one variable."
            )
        check_finite(one, f"Series {number}")
    return series


def check_finite(values: np.ndarray, what: str) -> None:
    """Raises UserError where a value is infinite; NaN is one that is missing."""
    infinite = np.isinf(values)
    if infinite.any():
        raise UserError(
            f"{what} has an infinite value at step {int(np.argmax(infinite.any(axis=0)))} or an "
            f"overflow of f32: leave it out as NaN."
            if infinite.ndim > 1
            else f"{what} has an infinite value at step {int(np.argmax(infinite))}, or one beyond "
            f"f32: leave it out as NaN."
        )


def left_padded(series: Sequence[np.ndarray] | np.ndarray, length: int) -> np.ndarray:
    """The last `length` values of each, f32 [B, length], with NaN in front of shorter ones."""
    rows = np.full((len(series), length), np.nan, np.float32)
    for row, one in zip(rows, series, strict=True):
        if kept := min(len(one), length):
            row[-kept:] = one[-kept:]
    return rows


def batches(
    series: Sequence[np.ndarray], context_length: int, unit: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers of the series, their last values [B, T]) of series of like lengths together; T is a
    multiple of `unit`, one of few, and covers what the model reads of each.
    """
    lengths = np.array([min(len(one), context_length) for one in series], np.int64)
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        length = round_length(int(lengths[numbers[0]]), context_length, unit)
        yield numbers, left_padded([series[number] for number in numbers], length)


def round_length(length: int, context_length: int, unit: int) -> int:
    """A length of contexts that is at least `length` and one of few: a multiple of `unit`, or all
    that the model reads.
    """
    return min(rounded(max(1, -(-length // unit))) * unit, context_length)
