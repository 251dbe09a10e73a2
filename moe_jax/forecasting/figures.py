"""Pictures of forecasts and of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_jax.forecasting.evaluate import ScoreComparison
from moe_jax.forecasting.metrics import METRICS
from moe_jax.forecasting.tables.frames import ItemForecast
from moe_jax.tracking.figures.style import BLUE, GREY, ORANGE, WIDTH

HISTORY = 256
"""Values of a series that are drawn before its forecast, at most."""


def forecast_figure(forecasts: Sequence[ItemForecast], levels: Sequence[float]) -> Figure:
    """A panel per item and target: its last values, the median, and a band for each pair of levels
    that lie around it, (0.1, 0.9) for example.
    """
    panels = [(one, number) for one in forecasts for number in range(len(one.quantiles))]
    figure = Figure(figsize=(WIDTH, 0.5 + 2.1 * len(panels)), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, (one, number) in zip(axes, panels, strict=True):
        _draw_forecast(ax, one, number, levels)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    return figure


def _draw_forecast(ax: Axes, one: ItemForecast, number: int, levels: Sequence[float]) -> None:
    target = list(one.item.targets)[number]
    kept = max(HISTORY - len(one.times), 2 * len(one.times))
    past, values = one.item.times[-kept:], one.item.targets[target][-kept:]
    ax.plot(past, values, color=GREY, linewidth=1.2, label="history")
    quantiles = one.quantiles[number]
    for low, high in _bands(levels):
        ax.fill_between(
            one.times,
            quantiles[:, low],
            quantiles[:, high],
            color=BLUE,
            alpha=0.22,
            linewidth=0,
            label=f"{levels[low]:g} to {levels[high]:g}",
        )
    has_median = 0.5 in levels
    middle = quantiles[:, list(levels).index(0.5)] if has_median else one.predictions[number]
    name = "median" if has_median else "prediction"
    marker = "o" if len(one.times) == 1 else None
    ax.plot(one.times, middle, color=BLUE, linewidth=1.6, marker=marker, markersize=4, label=name)
    ax.axvline(past[-1], color=ORANGE, linewidth=0.9, linestyle=":")
    several = len(one.item.targets) > 1
    ax.set_title(f"{one.item.name}: {target}" if several else str(one.item.name), loc="left")
    _plain(ax)


def _bands(levels: Sequence[float]) -> list[tuple[int, int]]:
    """The places of levels that are as far below the median as above it, widest first."""
    pairs = [
        (low, high)
        for low, level in enumerate(levels)
        for high, other in enumerate(levels)
        if level < 0.5 and math.isclose(level + other, 1)
    ]
    return sorted(pairs, key=lambda pair: levels[pair[0]])


def _plain(ax: Axes) -> None:
    ax.title.set_fontsize(10)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4))


def scores_figure(comparison: ScoreComparison) -> Figure:
    """Both scores of each data set, beside those of the baseline if there is one."""
    scores = comparison.scores
    figure = Figure(figsize=(WIDTH, 1.4 + 0.5 * len(scores)), dpi=120, layout="constrained")
    places = np.arange(len(scores))[::-1]
    sides = [(BLUE, comparison.model, scores, 0.2 if comparison.baseline else 0.0)]
    if comparison.baseline:
        sides.append((GREY, comparison.baseline, dict(comparison.baseline_scores), -0.2))
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for ax, metric in zip(axes, METRICS, strict=True):
        for colour, name, own, shift in sides:
            values = [own[data][metric] for data in scores]
            bars = ax.barh(places + shift, values, 0.36, color=colour, label=Path(name).stem)
            ax.bar_label(bars, fmt="%.4g", padding=3, fontsize=8)
        ax.set_yticks(places, list(scores))
        ax.set_title(f"{metric} (less is better)", loc="left")
        ax.margins(x=0.18, y=0.02)
        ax.set_axisbelow(True)
        _plain(ax)
        ax.set_yticks(places, list(scores))
        ax.grid(visible=False, axis="y")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def series_figure(series: Sequence[np.ndarray]) -> Figure:
    """Series side by side, each in its own scale."""
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(WIDTH, 0.3 + 1.5 * rows), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for number, (ax, one) in enumerate(zip(axes, series, strict=False)):
        ax.plot(one, color=BLUE, linewidth=0.8)
        ax.set_title(f"series {number}", loc="left")
        _plain(ax)
    for ax in axes[len(series) :]:
        ax.set_visible(False)
    return figure
