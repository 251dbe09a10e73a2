"""Quantiles at levels that a model does not give, by the rule of each library; in numpy.

Last dims count levels throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_jax.errors import UserError

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def check_levels(levels: Sequence[float]) -> None:
    """Raises UserError for what is no level of a quantile."""
    for level in levels:
        if not 0 <= level <= 1:
            raise UserError(f"quantile level {level} is not between 0 and 1.")


def equidistant_quantiles(
    values: np.ndarray, trained: Sequence[float], levels: Sequence[float]
) -> np.ndarray:
    """Chronos-Bolt's rule, for levels at equal distances: those of the model as they are, others by
    linear interpolation, beyond the outermost the outermost.
    """
    check_levels(levels)
    if set(levels) <= set(trained):
        return values[..., [list(trained).index(level) for level in levels]]
    ends = np.concatenate([values[..., :1], values, values[..., -1:]], axis=-1)
    return np.moveaxis(np.quantile(ends, np.asarray(levels, np.float32), axis=-1), 0, -1)


def interpolate_quantiles(
    levels: Sequence[float] | np.ndarray, trained: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Chronos-2's rule: linear between the trained levels [Q] or [..., Q] at any distances,
    constant beyond them; f32.
    """
    levels = np.asarray(levels, np.float32)
    trained = np.broadcast_to(np.asarray(trained, np.float32), values.shape)
    order = np.argsort(trained, axis=-1, kind="stable")
    at = np.take_along_axis(trained, order, -1)
    values = np.take_along_axis(values.astype(np.float32), order, -1)
    if at.min() > 0:
        at = np.concatenate([np.zeros_like(at[..., :1]), at], axis=-1)
        values = np.concatenate([values[..., :1], values], axis=-1)
    if at.max() < 1:
        at = np.concatenate([at, np.ones_like(at[..., :1])], axis=-1)
        values = np.concatenate([values, values[..., -1:]], axis=-1)
    results = []
    for level in levels:
        upper = np.sum(at <= level, axis=-1, keepdims=True).clip(1, at.shape[-1] - 1)
        low, high = (np.take_along_axis(at, upper - side, -1) for side in (1, 0))
        under, over = (np.take_along_axis(values, upper - side, -1) for side in (1, 0))
        width = high - low
        share = np.where(width == 0, 0, (level - low) / np.where(width == 0, 1, width))
        results.append(under + share * (over - under))
    return np.concatenate(results, axis=-1).astype(np.float32)


def weighted_quantiles(
    levels: Sequence[float] | np.ndarray, weights: np.ndarray, samples: np.ndarray
) -> np.ndarray:
    """Quantiles of samples [..., N] that stand for shares of the probability, weights [N]: linear
    between the sums of the weights up to each; f32.

    A rounding of these sums moves a result by its share of a weight times the distance of two
    samples: they are added up in f64, as torch does.
    """
    weights = np.asarray(weights, np.float32)
    order = np.argsort(samples, axis=-1, kind="stable")
    shares = (weights / np.float32(weights.sum(dtype=np.float64)))[order]
    sums = np.cumsum(shares, axis=-1, dtype=np.float64).astype(np.float32).clip(0, 1)
    return interpolate_quantiles(levels, sums, np.take_along_axis(samples, order, -1))


def level_shares(levels: Sequence[float]) -> np.ndarray:
    """The share of the probability that each level stands for, f32 [Q]: half of what is between its
    neighbours, 0 and 1 where it has none; they sum to 1.
    """
    around = np.concatenate([[0], np.asarray(levels, np.float32), [1]]).astype(np.float32)
    shares = (around[2:] - around[:-2]) / 2
    return shares / shares.sum(dtype=np.float32)
