"""MASE and WQL as the papers about Chronos compute them (gluonts' `evaluate_forecasts` with all
axes aggregated), summed up batch by batch.

    sums = ForecastScores(levels, season=24)
    for history, label, quantiles in forecasts:       # a series each: [T], [H], [H, levels]
        sums.add(history, label, quantiles)
    sums.mase, sums.wql

MASE is the mean over all series and steps of |y - median| / s, where s is the mean of
|x_t - x_(t-season)| over the whole history of the series, not over what the model reads of it. WQL
is the mean over the levels of the sum of 2 |(y - q)(1[q >= y] - level)| over all series and steps,
divided by the sum of |y|. Steps whose label is missing are in neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.errors import UserError

METRICS = ("MASE", "WQL")
PAPER_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The levels over which published WQLs are means."""

Scores = dict[str, float]
"""By the name of a metric."""


def seasonal_error(history: np.ndarray, season: int) -> float:
    """Mean |x_t - x_(t-season)| of a series [T] over the pairs whose values are both observed; with
    a season of 1 for a series that is shorter than its season. NaN where there is no pair.
    """
    season = 1 if season > len(history) else season
    differences = np.abs(history[season:] - history[: len(history) - season])
    observed = ~np.isnan(differences)
    return float(differences[observed].mean()) if observed.any() else math.nan


class ForecastScores:
    """Sums of a data set's errors, of which its scores follow."""

    def __init__(self, levels: Sequence[float], season: int):
        """Raises UserError where the median is not among the levels: MASE is that of the median."""
        if 0.5 not in levels:
            raise UserError(f"quantile levels {', '.join(map(str, levels))} lack 0.5, the median.")
        self.levels, self.season = np.asarray(levels, np.float64), season
        self._median = list(levels).index(0.5)
        self.series = 0
        self._scaled_errors, self._counted = 0.0, 0
        self._quantile_losses = np.zeros(len(levels))
        self._label_sum = 0.0

    def add(self, history: np.ndarray, label: np.ndarray, quantiles: np.ndarray) -> None:
        """Adds the forecast of a series: its history [T], what came [H], the quantiles [H, levels].

        Raises UserError for a forecast that is not a number where the label is.
        """
        history, label, quantiles = (
            np.asarray(values, np.float64) for values in (history, label, quantiles)
        )
        observed = ~np.isnan(label)
        label, quantiles = label[observed], quantiles[observed]
        if np.isnan(quantiles).any():
            raise UserError(f"the forecast of series {self.series} is not a number.")
        self.series += 1
        error_HQ = label[:, None] - quantiles
        self._quantile_losses += (2 * np.abs(error_HQ * ((error_HQ <= 0) - self.levels))).sum(0)
        self._label_sum += np.abs(label).sum()
        scale = seasonal_error(history, self.season)
        if scale > 0:  # a constant history has none, and its errors cannot be scaled
            self._scaled_errors += np.abs(error_HQ[:, self._median]).sum() / scale
            self._counted += len(label)

    @property
    def mase(self) -> float:
        """NaN where nothing was added whose errors can be scaled."""
        return self._scaled_errors / self._counted if self._counted else math.nan

    @property
    def wql(self) -> float:
        """NaN where all labels are 0 or missing."""
        mean_loss = float(self._quantile_losses.mean())
        return mean_loss / self._label_sum if self._label_sum else math.nan

    def result(self) -> Scores:
        """Both by name."""
        return {"MASE": self.mase, "WQL": self.wql}


def relative_scores(scores: Mapping[str, Scores], baseline: Mapping[str, Scores]) -> Scores:
    """For each metric the geometric mean, over the data sets, of the score divided by the
    baseline's.

    Raises UserError where the baseline has no score for one of the data sets, or one of them is not
    positive.
    """
    if not scores:
        raise UserError("there are no scores to compare with the baseline.")
    means = {}
    for metric in METRICS:
        logarithms = []
        for name, own in scores.items():
            if name not in baseline:
                raise UserError(f"the baseline has no score for {name}.")
            pair = own[metric], baseline[name][metric]
            if not all(0 < value < math.inf for value in pair):
                raise UserError(
                    f"{metric} of {name} is {pair[0]:g}, of the baseline {pair[1]:g}: a geometric "
                    f"mean needs positive numbers."
                )
            logarithms.append(math.log(pair[0] / pair[1]))
        means[metric] = math.exp(sum(logarithms) / len(logarithms))
    return means
