"""What a multivariate forecaster is given, as groups of rows: targets, then covariates of which
only the past is known, then those whose future is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import UserError
from moe_jax.forecasting.contexts import check_finite

SMOOTHING = 1.0  # how many values of a series' mean are added to those of a category


class Group(NamedTuple):
    """Rows that are forecast together; the first `targets` of them are asked for."""

    context_RT: np.ndarray
    future_RH: np.ndarray  # NaN where nothing is known
    targets: int


def as_groups(inputs: Any, horizon: int) -> list[Group]:
    """Series [T], several [R, T], or tasks (`forecaster.ForecastTask`), whose covariates may be
    numbers or categories. All tasks have covariates of the same names.

    Raises UserError for what is none of these, and for lengths that do not match.
    """
    single = isinstance(inputs, np.ndarray) and inputs.ndim == 1
    inputs = [inputs] if single else list(inputs)
    categories = _categories(inputs)
    return [_group(one, f"Series {at}", horizon, categories) for at, one in enumerate(inputs)]


def _group(one: Any, what: str, horizon: int, categories: dict[str, list[Any]]) -> Group:
    task = one if isinstance(one, Mapping) else {"target": one}
    if unknown := task.keys() - {"target", "past_covariates", "future_covariates"}:
        raise UserError(
            f"{what} has {sorted(unknown)[0]!r}, where a task has target, past_covariates and "
            f"future_covariates."
        )
    target = np.asarray(task.get("target", ()), np.float32)
    target = target[None] if target.ndim == 1 else target
    if target.ndim != 2 or not target.size:
        raise UserError(f"{what} has no target of shape [steps] or [variables, steps].")
    past, future = task.get("past_covariates") or {}, task.get("future_covariates") or {}
    if alone := future.keys() - past.keys():
        raise UserError(f"{what}: covariate {sorted(alone)[0]!r} has a future and no past.")
    rows, aheads = [*target], [np.full(horizon, np.nan, np.float32)] * len(target)
    for name in sorted(past, key=lambda name: (name in future, name)):
        before, after = np.asarray(past[name]), future.get(name)
        after = None if after is None else np.asarray(after)
        _check_length(before, target.shape[1], f"{what}: past covariate {name!r}")
        if after is not None:
            _check_length(after, horizon, f"{what}: future covariate {name!r}")
        if name in categories:
            before, after = _encode(before, after, target, categories[name])
        rows.append(before.astype(np.float32))
        try:
            aheads.append(aheads[0] if after is None else after.astype(np.float32))
        except ValueError as error:
            raise UserError(
                f"{what}: covariate {name!r} has numbers in its past, and in its future {error}."
            ) from error
    context_RT, future_RH = np.stack(rows), np.stack(aheads)
    check_finite(context_RT, what)
    check_finite(future_RH, f"The future of {what.lower()}")
    return Group(context_RT, future_RH, len(target))


def _check_length(values: np.ndarray, length: int, what: str) -> None:
    if values.shape != (length,):
        raise UserError(f"{what} has the shape {list(values.shape)} where {length} steps are due.")


def _is_number(values: np.ndarray) -> bool:
    return np.issubdtype(values.dtype, np.number)


def _is_missing(value: Any) -> bool:
    return value is None or value != value


def _by_type(value: Any) -> tuple[str, Any]:
    """A key by which values of several types can be sorted."""
    return str(type(value)), value


def _categories(inputs: Sequence[Any]) -> dict[str, list[Any]]:
    """The categories that each covariate has in all pasts, ascending; of those that are no
    numbers.
    """
    found: dict[str, set[Any]] = {}
    for one in inputs:
        past = (one.get("past_covariates") or {}) if isinstance(one, Mapping) else {}
        for name, values in past.items():
            values = np.asarray(values)
            if not _is_number(values):
                there = {value for value in values.tolist() if not _is_missing(value)}
                found.setdefault(name, set()).update(there)
    return {name: sorted(values, key=_by_type) for name, values in found.items()}


def _encode(
    past: np.ndarray, future: np.ndarray | None, target: np.ndarray, categories: list[Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """A category as numbers: with one target, the mean of its values where the category is, drawn
    towards their mean in the whole series; with several, its place among all categories.

    Missing is a category of its own. One that the past does not have is the series' mean, or NaN.
    """
    place = {value: number for number, value in enumerate(categories)}
    missing, unseen = len(categories), len(categories) + 1

    def codes(values: np.ndarray) -> np.ndarray:
        return np.array(
            [missing if _is_missing(one) else place.get(one, unseen) for one in values.tolist()],
            np.int64,
        )

    past_codes = codes(past)
    future_codes = None if future is None else codes(future)
    if len(target) > 1:
        number = np.array([*range(unseen), np.nan], np.float32)
    else:
        seen = np.isfinite(target[0])
        values = np.where(seen, target[0], 0).astype(np.float64)
        sums = np.bincount(past_codes, values, unseen + 1)
        counts = np.bincount(past_codes, seen, unseen + 1)
        mean = values.sum() / max(seen.sum(), 1)
        number = ((SMOOTHING * mean + sums) / (SMOOTHING + counts)).astype(np.float32)
    return number[past_codes], None if future_codes is None else number[future_codes]
