from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.forecasting.metrics import (
    PAPER_LEVELS,
    ForecastScores,
    relative_scores,
    seasonal_error,
)
from moe_jax.forecasting.seasonal_naive import SeasonalNaive
from tests.support import ROOT

PUBLISHED = ROOT.parent / "shared" / "data" / "chronos"


def test_scores_by_hand() -> None:
    """Seasonal error 1, errors of the median 0.5; quantile losses 1.2, 2 and 0.8 over a sum of
    22.
    """
    label = np.array([4.0, 5, 6, 7])
    sums = ForecastScores([0.1, 0.5, 0.9], season=4)
    sums.add(
        np.array([1, 2, 3, 4, 2, 3, 4, 5, 3, 4, 5, 6.0]),
        label,
        np.stack([label - 1.5, label - 0.5, label + 1], axis=1),
    )
    assert sums.mase == pytest.approx(0.5)
    assert sums.wql == pytest.approx((1.2 + 2 + 0.8) / 22 / 3)
    assert round(sums.wql, 10) == 0.0606060606
    assert sums.result() == {"MASE": sums.mase, "WQL": sums.wql}


def test_missing_labels_and_constant_histories_are_left_out() -> None:
    rising, label = np.arange(10.0), np.array([10.0, np.nan, 12.0])
    forecast = np.full((3, 1), 9.0)
    sums = ForecastScores([0.5], season=1)
    sums.add(rising, label, forecast)
    assert sums.mase == pytest.approx((1 + 3) / 2)
    assert sums.wql == pytest.approx((1 + 3) / 22)
    sums.add(np.ones(10), np.array([2.0, 2.0, 2.0]), forecast)  # no scale, so in WQL alone
    assert sums.mase == pytest.approx(2)
    assert sums.wql == pytest.approx((4 + 21) / 28)
    assert sums.series == 2
    with pytest.raises(UserError, match="series 2 is not a number"):
        sums.add(rising, label, np.full((3, 1), np.nan))
    assert math.isnan(ForecastScores([0.5], 1).mase) and math.isnan(ForecastScores([0.5], 1).wql)
    with pytest.raises(UserError, match=r"0\.1, 0\.9 lack 0\.5"):
        ForecastScores([0.1, 0.9], 1)


def test_seasonal_error() -> None:
    series = np.array([1.0, 5, 2, 7, np.nan, 8])
    assert seasonal_error(series, 2) == pytest.approx((1 + 2 + 1) / 3)
    assert seasonal_error(series, 7) == seasonal_error(series, 1) == pytest.approx((4 + 3 + 5) / 3)
    assert math.isnan(seasonal_error(np.array([1.0]), 1))


def test_seasonal_naive() -> None:
    series = np.array([1.0, 2, 3, 4, 5, np.nan, 7])
    naive = SeasonalNaive(3)
    quantiles, mean = naive.predict_quantiles([series, series[:2]], 4, [0.1, 0.5])
    np.testing.assert_array_equal(mean[0], [5, 3, 7, 5])  # 3 stands in for what is missing
    np.testing.assert_array_equal(mean[1], [1.5] * 4)
    np.testing.assert_array_equal(quantiles[0], np.stack([mean[0]] * 2, axis=1))
    both, _ = naive.predict_quantiles([{"target": np.stack([series, -series])}], 4, [0.5])
    np.testing.assert_array_equal(both[0][:, :, 0], [mean[0], -mean[0]])


def test_relative_scores() -> None:
    model = {"a": {"MASE": 1.0, "WQL": 0.1}, "b": {"MASE": 4.0, "WQL": 0.9}}
    base = {"a": {"MASE": 2.0, "WQL": 0.1}, "b": {"MASE": 2.0, "WQL": 0.1}, "c": {}}
    assert relative_scores(model, base) == pytest.approx({"MASE": 1.0, "WQL": 3.0})
    with pytest.raises(UserError, match="no score for b"):
        relative_scores(model, {"a": base["a"]})
    with pytest.raises(UserError, match="MASE of a is 0, of the baseline 2"):
        relative_scores({"a": {"MASE": 0.0, "WQL": 1.0}}, base)
    with pytest.raises(UserError, match="no scores"):
        relative_scores({}, base)


def scores_of(path: Path) -> dict[str, dict[str, float]]:
    with path.open() as file:
        return {
            row["dataset"]: {name: float(row[name]) for name in ("MASE", "WQL")}
            for row in csv.DictReader(file)
        }


@pytest.mark.skipif(not PUBLISHED.exists(), reason="../shared/data/chronos is not there")
@pytest.mark.parametrize(
    "part,expected",
    [
        ("in-domain", {"MASE": 0.7649019745781727, "WQL": 0.6288613368129368}),
        ("zero-shot", {"MASE": 0.8704764463925718, "WQL": 0.7108912052035352}),
    ],
)
def test_published_aggregates(part: str, expected: dict[str, float]) -> None:
    model = scores_of(PUBLISHED / f"chronos-t5-tiny-{part}.csv")
    baseline = scores_of(PUBLISHED / f"seasonal-naive-{part}.csv")
    assert relative_scores(model, baseline) == pytest.approx(expected, rel=1e-12)
    assert len(PAPER_LEVELS) == 9
