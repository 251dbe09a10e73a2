"""Which experts a forecaster's router gives to series of different patterns, and how it forecasts
them: python scripts/forecast_patterns.py runs/forecast-moe-tiny [--series 200] [--seed 0]

The patterns are trend, seasonal, noise and mixed, which is the sum of the three; each series draws
its own slope, period, level and size. A number is the mean weight of an expert over the series of a
pattern; a row sums to 1. `used` is e to the row's entropy, the number of experts if it used them
evenly; WQL is that of the forecast of what follows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_jax.forecasting.bolt import BoltForecaster
from moe_jax.forecasting.mixture import open_run, series_routes
from moe_jax.model_io.source import RunSource

LEVELS = tuple(round(0.1 * level, 1) for level in range(1, 10))


def trend(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """A line, up or down, with a little noise."""
    slope = rng.choice([-1, 1]) * rng.uniform(0.5, 2)
    return slope * time / len(time) + 0.02 * rng.standard_normal(len(time))


def seasonal(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """A wave and its first harmonic, with a little noise."""
    period, phase = rng.choice([7, 12, 24, 48, 168]), rng.uniform(0, 2 * np.pi, 2)
    angle = 2 * np.pi * time / period
    wave = np.sin(angle + phase[0]) + rng.uniform(0, 0.6) * np.sin(2 * angle + phase[1])
    return wave + 0.05 * rng.standard_normal(len(time))


def noise(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """White noise."""
    return rng.standard_normal(len(time))


def mixed(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """All three."""
    return trend(rng, time) + 0.5 * seasonal(rng, time) + 0.2 * noise(rng, time)


Pattern = Callable[[np.random.Generator, np.ndarray], np.ndarray]
PATTERNS: dict[str, Pattern] = {
    "trend": trend,
    "seasonal": seasonal,
    "noise": noise,
    "mixed": mixed,
}


class Usage(NamedTuple):
    """What became of the series of a pattern."""

    weight_E: np.ndarray  # mean over series, of the experts up to the largest that is used
    wql: float

    @property
    def spread(self) -> float:
        """As many experts as it uses, if it used them evenly: e to the entropy of the weights."""
        weights = self.weight_E[self.weight_E > 0]
        return float(np.exp(-np.sum(weights * np.log(weights))))


def usage_of(forecaster: BoltForecaster, draw: Pattern, count: int, seed: int) -> Usage:
    """Routes and forecasts of `count` series of a pattern."""
    rng = np.random.default_rng(seed)
    size, horizon = forecaster.context_length, forecaster.prediction_length
    time = np.arange(size + horizon)
    series = np.stack([draw(rng, time) for _ in range(count)])
    scale, level = rng.lognormal(size=(count, 1)), 10 * rng.standard_normal((count, 1))
    series = (scale * series + level).astype(np.float32)
    context, target = series[:, :size], series[:, size:]
    quantiles, _ = forecaster.predict_quantiles(list(context), horizon, LEVELS)
    errors, levels = target[..., None] - quantiles, np.asarray(LEVELS)
    losses = 2 * np.maximum(levels * errors, (levels - 1) * errors)
    routes = series_routes(forecaster, context)
    weight_E = np.bincount(routes.expert_TK.ravel(), routes.weight_TK.ravel()) / count
    return Usage(weight_E, float(losses.sum(axis=(0, 1)).mean() / np.abs(target).sum()))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Usage of a forecaster's experts by pattern.")
    parser.add_argument("run", type=Path, help="directory of a run that trained a forecaster")
    parser.add_argument("--series", type=int, default=200, help="series per pattern")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    forecaster = open_run(RunSource(args.run))
    usage = {
        name: usage_of(forecaster, draw, args.series, args.seed) for name, draw in PATTERNS.items()
    }
    experts = max(len(one.weight_E) for one in usage.values())
    print("| pattern | " + " | ".join(map(str, range(experts))) + " | used | WQL |")
    print("|---" * (experts + 3) + "|")
    for name, one in usage.items():
        weights = np.pad(one.weight_E, (0, experts - len(one.weight_E)))
        cells = " | ".join(f"{weight:.2f}" for weight in weights)
        print(f"| {name} | {cells} | {one.spread:.1f} | {one.wql:.4f} |")


if __name__ == "__main__":
    main()
