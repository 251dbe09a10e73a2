"""The baseline of the papers: the last season once more, the same value at every level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SEASONAL_NAIVE = "seasonal-naive"
"""What commands call it, where they take a model."""


class SeasonalNaive:
    """A `Forecaster` that repeats the last `season` values of each series, in f64.

    Where one of them is missing, the last observed value of its place in the season takes its
    place, or, where there is none, the mean of the series. A series shorter than its season is
    continued with its mean, as gluonts does. Covariates are not read.
    """

    context_length = None
    prediction_length = None
    quantiles = ()
    multivariate = True

    def __init__(self, season: int):
        self.season = season

    def predict_quantiles(
        self,
        inputs: Sequence[Any],
        prediction_length: int,
        quantile_levels: Sequence[float],
        *,
        batch_size: int = 256,
        num_samples: int | None = None,
        seed: int = 0,
        first_series: int = 0,
    ) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
        """See `Forecaster`; for an input [T] [H, levels] and [H], for other inputs with targets in
        front.
        """
        means = [self._continued(one, prediction_length) for one in inputs]
        shape = (len(quantile_levels),)
        return [np.broadcast_to(mean[..., None], mean.shape + shape) for mean in means], means

    def _continued(self, one: Any, horizon: int) -> np.ndarray:
        target = np.asarray(one["target"] if isinstance(one, Mapping) else one, np.float64)
        if target.ndim == 1:
            return self._repeat(target, horizon)
        return np.stack([self._repeat(row, horizon) for row in target])

    def _repeat(self, series: np.ndarray, horizon: int) -> np.ndarray:
        observed = ~np.isnan(series)
        mean = series[observed].mean() if observed.any() else np.nan
        if len(series) < self.season:
            return np.full(horizon, mean)
        last = series[-self.season :].copy()
        for place in np.flatnonzero(np.isnan(last)):
            earlier = series[len(series) - self.season + place :: -self.season]
            earlier = earlier[~np.isnan(earlier)]
            last[place] = earlier[0] if len(earlier) else mean
        return last[np.arange(horizon) % self.season]
