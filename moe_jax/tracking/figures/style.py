"""What all pictures of a run share: colours, axes of steps, lines of layers."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from moe_jax.tracking.history import History, finite, last, running_mean

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"

WIDTH = 9.0  # inches, of every figure

MAX_PANELS = 12  # of the load heatmap

MAX_NAMED_LAYERS = 8  # with more, a colour bar takes the place of names

MAX_BINS = 300  # spans of steps across a panel of the heatmap

End = tuple[str, float, object]  # a line's name, the height at which it ends, its colour


def step_figure(history: History, *labels: str) -> tuple[Figure, list[Axes]]:
    """A figure with one panel above the other for each y label, over the run's steps."""
    figure = Figure(
        figsize=(WIDTH, 3.6 if len(labels) == 1 else 5.0), dpi=120, layout="constrained"
    )
    axes = list(figure.subplots(len(labels), 1, sharex=True, squeeze=False)[:, 0])
    step = history.column("step")
    for ax, label in zip(axes, labels, strict=True):
        ax.set_ylabel(label, fontsize=10)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
        ax.xaxis.set_major_locator(_step_ticks(history, 10))
        ax.set_xlim((step[0], step[-1]) if len(step) > 1 else (step[0] - 1, step[0] + 1))
    axes[-1].set_xlabel("step", fontsize=10)
    return figure, axes


def _step_ticks(history: History, most: int) -> FixedLocator | MaxNLocator:
    step = history.column("step")
    return (
        MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True)
        if len(step) > 1
        else FixedLocator(step.tolist())
    )


def _line(ax: Axes, step: np.ndarray, values: np.ndarray, colour: object) -> None:
    """A line over the steps; with few points they are marked, so that a single one can be seen."""
    marker = "o" if np.isfinite(values).sum() <= 30 else None
    ax.plot(
        step,
        values,
        color=colour,
        linewidth=1.5,
        marker=marker,
        markersize=4,
        clip_on=marker is None,
        zorder=3,
    )


def _smooth_line(ax: Axes, history: History, values: np.ndarray, colour: str, name: str) -> End:
    """Draws the running mean of `values` over the faint values; `name` is a format for its last
    value.
    """
    step, (smooth, window) = history.column("step"), running_mean(values)
    if window > 1:
        ax.plot(step, values, color=colour, alpha=0.35, linewidth=0.8)
    # Each mean stands in the middle of its steps: at their end, a falling line would run above its
    # values.
    _line(ax, running_mean(step)[0], smooth, colour)
    return (
        name.format(last(smooth)) + (f"\n(mean of {window})" if window > 1 else ""),
        last(smooth),
        colour,
    )


def layer_lines(ax: Axes, history: History, values_NL: np.ndarray) -> tuple[list[End], list[float]]:
    """A line of running means for each MoE layer, dark to bright with depth; returns names for few
    layers, and last values.
    """
    step, (smooth_NL, window) = running_mean(history.column("step"))[0], running_mean(values_NL)
    if window > 1:
        ax.set_ylabel(f"{ax.get_ylabel()}\nmean of {window}", fontsize=10)
    few = len(history.layers) <= MAX_NAMED_LAYERS
    norm = Normalize(history.layers[0], max(history.layers[-1], history.layers[0] + 1))
    # The brightest fifth of the scale is too pale to read on white.
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.8, 256)))
    for index, layer in enumerate(history.layers):
        _line(ax, step, smooth_NL[:, index], colours(norm(layer)))
    latest = [last(smooth_NL[:, index]) for index in range(len(history.layers))]
    if few:
        return [
            (f"layer {layer}", end, colours(norm(layer)))
            for layer, end in zip(history.layers, latest, strict=True)
        ], latest
    bar = ax.figure.colorbar(
        ScalarMappable(norm, colours), ax=ax, pad=0.02, fraction=0.04, aspect=25
    )
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    bar.set_label("layer", fontsize=9)
    return [], latest


def name_ends(ax: Axes, ends: list[End]) -> None:
    """Writes each line's name right of the panel at the height where it ends, moved apart where
    they would overlap.
    """
    ends = sorted((end for end in ends if math.isfinite(end[1])), key=lambda end: end[1])
    if not ends:
        return
    ax.get_ylim()  # settles the limits that the heights depend on
    true = [
        float(
            ax.transAxes.inverted().transform(ax.transData.transform((ax.get_xlim()[1], height)))[1]
        )
        for _, height, _ in ends
    ]
    inches = 0.8 * ax.figure.get_figheight() / len(ax.figure.axes)  # type: ignore[union-attr]
    space = [0.16 * (1 + name.count("\n")) / inches for name, _, _ in ends]
    place = list(true)
    for index in range(1, len(place)):
        place[index] = max(place[index], place[index - 1] + (space[index] + space[index - 1]) / 2)
    place[-1] = min(place[-1], 1.0)
    for index in range(len(place) - 2, -1, -1):
        place[index] = min(place[index], place[index + 1] - (space[index] + space[index + 1]) / 2)
    for (name, _, colour), height, label_height in zip(ends, true, place, strict=True):
        line = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.7,
            "shrinkA": 1,
            "shrinkB": 0,
            "relpos": (0, 0.5),
        }
        at: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "axes fraction",
            "annotation_clip": False,
        }
        text: dict[str, Any] = {"color": colour, "fontsize": 9, "va": "center"}
        ax.annotate(name, (1, height), (1.02, label_height), arrowprops=line, **at, **text)


def _log_if_wide(ax: Axes, values: np.ndarray) -> None:
    """A logarithmic axis where positive values span more than a factor of ten."""
    values = finite(values)
    if values.size and values.min() > 0 and values.max() > 10 * values.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())


def load_scale(ratio_BLE: np.ndarray) -> tuple[LogNorm, list[float]]:
    """A logarithmic colour scale with 1 in its middle that holds 99% of the ratios, and its
    ticks.
    """
    positive = ratio_BLE[ratio_BLE > 0]
    spread = float(np.exp(np.quantile(np.abs(np.log(positive)), 0.99))) if positive.size else 1.0
    limit = next((limit for limit in (1.25, 1.5, 2.0, 4.0, 8.0) if limit >= spread), 16.0)
    above = (
        [limit] if limit < 2 else [2.0**power for power in range(1, round(math.log2(limit)) + 1)]
    )
    return LogNorm(1 / limit, limit), [1 / tick for tick in above] + [1.0] + above
