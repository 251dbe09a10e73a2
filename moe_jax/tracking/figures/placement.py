"""The report's figures about devices: load over time, the effect of each placement decision, links
and replicas.

In the style of `training.py` beside it. Rank r is the r-th device along the expert axis.
"""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from moe_jax.placement.table import Placement
from moe_jax.tracking.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    WIDTH,
    layer_lines,
    load_scale,
    name_ends,
    step_figure,
)
from moe_jax.tracking.history import History, decisions, describe_links, finite, measured_link_rows
from moe_jax.utils.units import less

NEWEST = 4  # so many decisions are drawn with their loads
MAX_NUMBERED = 8  # with more ranks the link figure has no numbers
MAX_REPLICATED = 16  # of so many experts, the busiest, replicas are drawn
LABEL = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}  # behind numbers
# Of replicas; dark text is legible on each.
SHADES = ("#9ecae1", "#fdd0a2", "#a1d99b", "#dadaeb", "#fcbba1", "#d9d9d9")


def placement_figures(history: History, table: Placement | None) -> dict[str, Figure]:
    """The figures for which `history` has data, by file name without its ending; `table` is that of
    the newest checkpoint.
    """
    figures: dict[str, Figure] = {}
    if finite(history.device_load_NL).size:
        figures["device_load"] = device_load(history)
    done = [decision for decision in decisions(history.events) if decision["accepted"]]
    if done:
        figures["placement_effect"] = placement_effect(done)
    if history.traffic:
        figures["link_traffic"] = link_traffic(history.traffic)
    step = None if table is None else _step_of(history, table)
    if table is not None and step is not None:
        figures["replica_use"] = replica_use(history, table, step)
    return figures


def device_load(history: History) -> Figure:
    """Load of the busiest device divided by the mean, one line per MoE layer, with the placement
    decisions.
    """
    figure, (ax,) = step_figure(history, "device load, max / mean")
    ends, latest = layer_lines(ax, history, history.device_load_NL)
    seen = history.device_load_NL[np.isfinite(history.device_load_NL).all(1)]
    start = f"{seen[0].mean():.2f} times the mean load at first, " if len(seen) else ""
    ax.set_title(
        f"Busiest device, averaged over layers: {start}{np.mean(latest):.2f} times at the end",
        loc="left",
        fontsize=12,
    )
    made = decisions(history.events)
    ax.set_ylim(1, 1 + (ax.get_ylim()[1] - 1) * (1.2 if made else 1.0))  # room for the legend
    for accepted, colour, style, name in (
        (True, GREEN, "-", "experts moved"),
        (False, GREY, ":", "move refused"),
    ):
        steps = [decision["step"] for decision in made if decision["accepted"] == accepted]
        for step in steps:
            ax.axvline(step, color=colour, linestyle=style, linewidth=1.2, zorder=1)
        if steps:
            ax.plot(
                [],
                [],
                color=colour,
                linestyle=style,
                label=f"{name} ({len(steps)} times)" if len(steps) > 1 else name,
            )
    if made:
        ax.legend(loc="upper right", fontsize=9, framealpha=0.9)
    name_ends(ax, ends)
    return figure


def placement_effect(done: list[dict[str, Any]]) -> Figure:
    """Load by rank before each of the newest accepted decisions, and after it as predicted and as
    measured.
    """
    shown = done[-NEWEST:]
    across = min(len(shown), 2)
    down = -(-len(shown) // across)
    figure = Figure(figsize=(WIDTH, 1.2 + 2.4 * down), dpi=120, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for ax in grid.flat[len(shown) :]:
        ax.set_visible(False)
    for decision, ax in zip(shown, grid.flat, strict=False):
        _effect_panel(ax, decision)
    handles, labels = max(
        (ax.get_legend_handles_labels() for ax in grid.flat), key=lambda legend: len(legend[1])
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.supylabel("load / mean", fontsize=10)
    which = (
        f"the newest {len(shown)} of {len(done)} moves"
        if len(done) > len(shown)
        else "each move"
        if len(done) > 1
        else "the move"
    )
    newest = next((decision for decision in reversed(shown) if decision["realised"]), None)
    title = f"Load by device before and after {which}"
    if newest:
        measured, predicted = newest["realised"]["realised_gain"], newest["predicted_gain"]
        title += f": {less(measured)} from step {newest['step']} (predicted {less(predicted)})"
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return figure


def _effect_panel(ax: Axes, decision: dict[str, Any]) -> None:
    """The loads of one decision divided by their mean, by rank."""
    predicted, realised = decision["predicted"], decision["realised"]
    edges = np.arange(len(predicted["device_load_before"]) + 1) - 0.5
    ax.stairs(
        _over_mean(predicted["device_load_before"]),
        edges,
        fill=True,
        color="#cccccc",
        label="before",
    )
    ax.stairs(
        _over_mean(predicted["device_load_after"]),
        edges,
        color=ORANGE,
        linewidth=3,
        baseline=None,
        label="predicted after",
    )
    title = f"step {decision['step']}: a layer's max/mean {predicted['max_over_mean_before']:.2f}"
    if realised:
        ax.stairs(
            _over_mean(realised["device_load_after"]),
            edges,
            color=BLUE,
            linewidth=1.6,
            baseline=None,
            label="measured after",
        )
        title += f" to {realised['max_over_mean_after']:.2f}"
    ax.axhline(1, color=GREY, linestyle="--", linewidth=0.8)
    ax.set_title(title if realised else f"{title}, not measured yet", fontsize=10, loc="left")
    ax.set_xlabel("rank", fontsize=9)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def _over_mean(load: list[float]) -> np.ndarray:
    values = np.asarray(load, np.float64)
    return values / max(values.mean(), 1e-9)


def link_traffic(traffic: dict[str, Any]) -> Figure:
    """Rows from each rank to each other rank, per step, of all MoE layers together; rows on the
    diagonal stay on their device.
    """
    rows_RR = measured_link_rows(traffic)
    ranks = len(rows_RR)
    figure = Figure(figsize=(WIDTH, 4.6), dpi=120, layout="constrained")
    ax = figure.subplots()
    own = np.eye(ranks, dtype=bool)
    mean = max(float(rows_RR[~own].mean()) if ranks > 1 else 0.0, 1e-9)
    norm, ticks = load_scale(rows_RR[~own] / mean)
    edges = np.arange(ranks + 1) - 0.5
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#dddddd", under="black")
    # A link without rows is below the scale.
    shown_RR = np.where(rows_RR > 0, np.maximum(rows_RR / mean, min(ticks)), 1e-9)
    ax.pcolormesh(edges, edges, np.ma.masked_array(shown_RR, own), cmap=colours, norm=norm)
    if ranks <= MAX_NUMBERED:
        for source, destination in np.ndindex(ranks, ranks):
            ax.text(
                destination,
                source,
                f"{rows_RR[source, destination]:,.0f}",
                ha="center",
                va="center",
                fontsize=9,
                bbox=LABEL,
            )
    ax.invert_yaxis()
    ax.set_xlabel("to rank", fontsize=10)
    ax.set_ylabel("from rank", fontsize=10)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=ax, extend="both", pad=0.02, aspect=25)
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    bar.set_label("rows / mean link's (grey: within a device, black: none)", fontsize=9)
    figure.suptitle(
        f"Links at step {traffic['step']:,}: {describe_links(rows_RR)}",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    return figure


def replica_use(history: History, table: Placement, step: int) -> Figure:
    """How the choices of the busiest replicated experts were divided among their replicas, by
    device, in the training line of `step`.
    """
    load_LP = history.slot_load[int(np.flatnonzero(history.column("step") == step)[0])]
    per_rank = table.num_slots // table.ranks
    replicated = [
        (layer, expert, table.slots_of(layer, expert))
        for layer, expert in np.argwhere(table.replica_count() > 1).tolist()
    ]
    replicated.sort(key=lambda item: -load_LP[item[0], item[2]].sum())
    shown = replicated[:MAX_REPLICATED]
    figure = Figure(figsize=(WIDTH, 1.3 + 0.28 * len(shown)), dpi=120, layout="constrained")
    ax = figure.subplots()
    for row, (layer, _, slots) in enumerate(shown):
        start, mean = 0.0, max(float(load_LP[layer].sum()) / table.num_experts, 1e-9)
        for replica, slot in enumerate(slots):
            width = load_LP[layer, slot] / mean
            ax.barh(
                row,
                width,
                left=start,
                height=0.75,
                color=SHADES[replica % len(SHADES)],
                edgecolor="white",
                linewidth=1,
            )
            ax.text(
                start + width / 2, row, f"{slot // per_rank}", ha="center", va="center", fontsize=8
            )
            start += width
    ax.set_yticks(
        range(len(shown)),
        [f"layer {history.layers[layer]}, expert {expert}" for layer, expert, _ in shown],
        fontsize=8,
    )
    ax.invert_yaxis()
    some = (
        f" (the {len(shown)} busiest of {len(replicated)})" if len(shown) < len(replicated) else ""
    )
    ax.set_xlabel(f"choices / mean expert's{some}", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    parts = [load_LP[layer, slots] for layer, _, slots in replicated]
    share = sum(float(part.sum()) for part in parts) / max(float(load_LP.sum()), 1.0)
    uneven = max(float(part.max() / max(part.mean(), 1e-9)) for part in parts)
    title = (
        f"{len(replicated)} replicated experts took {share:.0%} of the choices at step "
        f"{step:,}; the fullest replica {uneven:.2f} x even"
    )
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return figure


def _step_of(history: History, table: Placement) -> int | None:
    """The step of the newest training line whose choices by slot add up to those by expert under
    `table`; None if there is none, or no replicas.
    """
    if not np.any(table.replica_count() > 1):
        return None
    slots_LP = table.physical_to_logical
    for index in reversed(range(len(history.slot_load))):
        load_LP = history.slot_load[index]
        if load_LP.shape != slots_LP.shape:
            continue
        by_expert = [
            np.bincount(slots[slots >= 0], load[slots >= 0], table.num_experts)
            for slots, load in zip(slots_LP, load_LP, strict=True)
        ]
        if np.allclose(by_expert, history.load_NLE[index]):
            return int(history.column("step")[index])
    return None
