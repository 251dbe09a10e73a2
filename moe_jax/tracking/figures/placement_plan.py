"""The picture of `moe-jax placement plan`: load by device, and rows between devices, today and as
proposed; in the style of `training.py` beside it.
"""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moe_jax.tracking.figures.style import BLUE, GREY, ORANGE, WIDTH
from moe_jax.tracking.placement_report import Comparison, figures

FEW = 64  # up to so many devices there are separate bars


def comparison_figure(comparison: Comparison) -> Figure:
    """Bars of the rows per step of each device, and two heat maps of the rows from device to
    device, of all MoE layers together.
    """
    figure = Figure(figsize=(WIDTH, 7.4), dpi=120, layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(0.8, 1))[:, 0]
    _bars(above.subplots(), comparison)
    maps = below.subplots(1, 2)
    colours = matplotlib.colormaps["viridis"]
    between = [
        one.sent_RR * (1 - np.eye(len(one.sent_RR)))
        for one in (comparison.today, comparison.proposed)
    ]
    norm = Normalize(0, max(max(rows.max(initial=0.0) for rows in between), 1e-9))
    for ax, rows, own, name in zip(
        maps, between, (comparison.today, comparison.proposed), ("today", "proposed"), strict=True
    ):
        _heat_map(ax, rows, comparison.host_R, norm)
        kept = float(np.trace(own.sent_RR) / max(own.sent_RR.sum(), 1e-30))
        ax.set_title(
            f"{name}: {kept:.0%} of the rows stay on their device", fontsize=10, loc="left"
        )
    bar = below.colorbar(ScalarMappable(norm, colours), ax=maps, pad=0.02, fraction=0.05, aspect=25)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bar.set_label("rows per step (grey: within a device)", fontsize=9)
    sums = figures(comparison)
    load, link = sums["max_over_mean"], sums["busiest_link_rows"]
    title = (
        f"Busiest device {load[0]:.2f} to {load[1]:.2f} times the mean, busiest link "
        f"{link[0]:,.0f} to {link[1]:,.0f} rows per step"
        + ("" if comparison.between_weight == 1 else " (weighted between hosts)")
    )
    figure.suptitle(f"{comparison.title}\n{title}", fontsize=12, x=0.01, ha="left")
    return figure


def _bars(ax: Axes, comparison: Comparison) -> None:
    """Rows per step of each device, today and proposed; lines where there are many devices."""
    loads = [one.load_LR.sum(0) for one in (comparison.today, comparison.proposed)]
    ranks = np.arange(len(loads[0]))
    for load, colour, name, shift in zip(
        loads, (ORANGE, BLUE), ("today", "proposed"), (-0.2, 0.2), strict=True
    ):
        if len(ranks) <= FEW:
            ax.bar(ranks + shift, load, 0.4, color=colour, label=name)
        else:
            ax.step(ranks, load, where="mid", color=colour, linewidth=1, label=name)
    ax.axhline(loads[0].mean(), color=GREY, linestyle="--", linewidth=1, label="mean")
    ax.set_xlim(-0.6, len(ranks) - 0.4)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("device", fontsize=10)
    ax.set_ylabel("rows per step, all layers", fontsize=10)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.legend(fontsize=9, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))


def _heat_map(ax: Axes, rows_RR: np.ndarray, host_R: np.ndarray, norm: Normalize) -> None:
    """Rows from each device (down) to each (across), with white lines between hosts."""
    edges = np.arange(len(rows_RR) + 1) - 0.5
    image = np.ma.masked_array(rows_RR, np.eye(len(rows_RR), dtype=bool))
    ax.pcolormesh(
        edges,
        edges,
        image,
        cmap=matplotlib.colormaps["viridis"].with_extremes(bad="#bbbbbb"),
        norm=norm,
    )
    for cut in np.flatnonzero(np.diff(host_R)) + 0.5:
        ax.axhline(cut, color="white", linewidth=1.5)
        ax.axvline(cut, color="white", linewidth=1.5)
    ax.invert_yaxis()
    ax.set_aspect("equal")
    ax.set_xlabel("to device", fontsize=9)
    ax.set_ylabel("from device", fontsize=9)
    ax.tick_params(labelsize=8)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True))
