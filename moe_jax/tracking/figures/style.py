"""What all pictures of a run share: colours, axes over steps, one line per layer."""

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

MAX_NAMED_LAYERS = 8  # for more layers there is a colour bar instead of names

MAX_BINS = 300  # spans of steps in a panel of the heatmap

End = tuple[str, float, object]  # name of a line, the height at which it ends, colour


def step_figure(history: History, *labels: str) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per y label, one above the other, over the steps of the run."""
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
        ax.xaxis.set_major_locator(step_ticks(history, 10))
        ax.set_xlim((step[0], step[-1]) if len(step) > 1 else (step[0] - 1, step[0] + 1))
    axes[-1].set_xlabel("step", fontsize=10)
    return figure, axes


def step_ticks(history: History, most: int) -> FixedLocator | MaxNLocator:
    """At most `most` ticks on the axis of steps."""
    step = history.column("step")
    return (
        MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True)
        if len(step) > 1
        else FixedLocator(step.tolist())
    )


def draw_line(ax: Axes, step: np.ndarray, values: np.ndarray, colour: object) -> None:
    """A line over the steps; few points are marked, so that a single one can be seen."""
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


def smooth_line(ax: Axes, history: History, values: np.ndarray, colour: str, name: str) -> End:
    """Draws `values` faintly and their running mean strongly; `name` is a format for the last
    mean.
    """
    step, (smooth, window) = history.column("step"), running_mean(values)
    if window > 1:
        ax.plot(step, values, color=colour, alpha=0.35, linewidth=0.8)
    # Each mean is drawn in the middle of its steps: at their end, a falling line would be above its
    # values.
    draw_line(ax, running_mean(step)[0], smooth, colour)
    return (
        name.format(last(smooth)) + (f"\n(mean of {window})" if window > 1 else ""),
        last(smooth),
        colour,
    )


def layer_lines(ax: Axes, history: History, values_NL: np.ndarray) -> tuple[list[End], list[float]]:
    """One line of running means per MoE layer, brighter with depth; returns the names, if there are
    few layers, and the last values.
    """
    step, (smooth_NL, window) = running_mean(history.column("step"))[0], running_mean(values_NL)
    if window > 1:
        ax.set_ylabel(f"{ax.get_ylabel()}\nmean of {window}", fontsize=10)
    few = len(history.layers) <= MAX_NAMED_LAYERS
    norm = Normalize(history.layers[0], max(history.layers[-1], history.layers[0] + 1))
    # The brightest fifth of the scale is too pale to read on white.
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.8, 256)))
    for index, layer in enumerate(history.layers):
        draw_line(ax, step, smooth_NL[:, index], colours(norm(layer)))
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
    """Writes the name of each line to the right of the panel, at the height where the line ends;
    names that would overlap are moved apart.
    """
    ends = sorted((end for end in ends if math.isfinite(end[1])), key=lambda end: end[1])
    if not ends:
        return
    ax.get_ylim()  # fixes the limits on which the heights depend
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


def log_if_wide(ax: Axes, values: np.ndarray) -> None:
    """A logarithmic axis if the values are positive and span more than a factor of ten."""
    values = finite(values)
    if values.size and values.min() > 0 and values.max() > 10 * values.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())


def load_scale(ratio_BLE: np.ndarray) -> tuple[LogNorm, list[float]]:
    """A logarithmic colour scale with 1 in its middle that covers 99% of the ratios, and its
    ticks.
    """
    positive = ratio_BLE[ratio_BLE > 0]
    spread = float(np.exp(np.quantile(np.abs(np.log(positive)), 0.99))) if positive.size else 1.0
    limit = next((limit for limit in (1.25, 1.5, 2.0, 4.0, 8.0) if limit >= spread), 16.0)
    above = (
        [limit] if limit < 2 else [2.0**power for power in range(1, round(math.log2(limit)) + 1)]
    )
    return LogNorm(1 / limit, limit), [1 / tick for tick in above] + [1.0] + above
