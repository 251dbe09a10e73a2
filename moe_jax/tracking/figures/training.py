"""The figures of a run's report, drawn with matplotlib from its history. `tracking/report.py`
imports this only when it draws.

Drawn without pyplot, so nothing global changes. All have the same size and style: a thin grid,
colours that colour-blind readers can distinguish, names at the ends of the lines, and a title that
says what the figure shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from moe_jax.tracking.figures.style import (
    BLUE,
    GREEN,
    GREY,
    MAX_BINS,
    MAX_PANELS,
    ORANGE,
    WIDTH,
    draw_line,
    layer_lines,
    load_scale,
    log_if_wide,
    name_ends,
    smooth_line,
    step_figure,
    step_ticks,
)
from moe_jax.tracking.history import (
    History,
    finite,
    first,
    last,
    median,
    relative_load,
    running_mean,
)


def all_figures(history: History, loss_unit: str) -> dict[str, Figure]:
    """The figures for which `history` has data, by file name without its ending, in the order of
    the report.
    """
    draw: dict[str, Callable[[History], Figure]] = {"loss": partial(loss, unit=loss_unit)}
    if history.layers:
        draw |= {
            "expert_load": expert_load,
            "load_imbalance": load_imbalance,
            "router_entropy": router_entropy,
            "drop_rate": drop_rate,
        }
    draw |= {"throughput": throughput, "gradient": gradient}
    return {name: function(history) for name, function in draw.items()}


def loss(history: History, unit: str) -> Figure:
    """Training loss, faint with a strong running mean, and the validation losses."""
    ce = history.column("ce_loss")
    figure, (ax,) = step_figure(history, f"loss ({unit})")
    ends = [smooth_line(ax, history, ce, BLUE, "training {:.3f}")]
    title = (
        f"Training loss from {first(ce):.2f} to {last(running_mean(ce)[0]):.2f}"
        if len(ce) > 1
        else f"Training loss {first(ce):.2f}"
    )
    if history.validation:
        val_loss = history.validation["val_loss"]
        ax.plot(
            history.validation["step"],
            val_loss,
            color=ORANGE,
            marker="o",
            markersize=5,
            linewidth=1.4,
            clip_on=False,
            zorder=3,
        )
        ends.append((f"validation {last(val_loss):.3f}", last(val_loss), ORANGE))
        title += f", validation loss to {last(val_loss):.2f}"
    ax.set_title(title, loc="left", fontsize=12)
    log_if_wide(ax, ce)
    name_ends(ax, ends)
    return figure


def expert_load(history: History) -> Figure:
    """One heatmap per MoE layer: expert over step, coloured by load divided by the layer's mean (1
    is even).
    """
    count = len(history.layers)
    shown = np.linspace(0, count - 1, min(count, MAX_PANELS)).round().astype(int)
    edges, ratio_BLE = relative_load(history.column("step"), history.load_NLE, MAX_BINS)
    norm, ticks = load_scale(ratio_BLE)
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="black")
    across = min(len(shown), 3 if len(shown) > 4 else 2)
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(WIDTH, max(3.6, 1.2 + 1.7 * down)), dpi=120, layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for ax in grid.flat[len(shown) :]:
        ax.set_visible(False)
    for index, (layer, ax) in enumerate(zip(shown, grid.flat, strict=False)):
        image_EB = np.ma.masked_equal(ratio_BLE[:, layer].T, 0)
        ax.pcolormesh(edges, np.arange(len(image_EB) + 1) - 0.5, image_EB, cmap=colours, norm=norm)
        ax.set_title(f"layer {history.layers[layer]}", fontsize=9, loc="left")
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        ax.xaxis.set_major_locator(step_ticks(history, 5))
        ax.tick_params(labelsize=8, labelbottom=index + across >= len(shown))
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=grid, extend="both", pad=0.015, fraction=0.05, aspect=25
    )
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    bar.set_label("load / layer's mean (black: no token)", fontsize=9)
    fullest, expert = np.unravel_index(ratio_BLE[-1].argmax(), ratio_BLE.shape[1:])
    some = f" ({len(shown)} of {count} MoE layers shown)" if len(shown) < count else ""
    end = (
        f"at the end up to {ratio_BLE[-1].max():.2f} times even (expert {expert} of layer "
        f"{history.layers[fullest]})"
    )
    title = f"Expert load{some}: {end}"
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return figure


def load_imbalance(history: History) -> Figure:
    """The excess of the busiest expert over the mean, one line per MoE layer."""
    figure, (ax,) = step_figure(history, "max load / mean load - 1")
    ends, latest = layer_lines(ax, history, history.max_violation_NL)
    title = (
        f"A layer's busiest expert ended {np.mean(latest):.0%} above the mean, on average "
        f"over layers"
    )
    ax.set_title(title, loc="left", fontsize=12)
    ax.set_ylim(bottom=0)
    name_ends(ax, ends)
    return figure


def router_entropy(history: History) -> Figure:
    """Router entropy, one line per MoE layer, and its maximum ln E, dashed."""
    experts = history.load_NLE.shape[2]
    figure, (ax,) = step_figure(history, "router entropy (nats)")
    ends, latest = layer_lines(ax, history, history.router_entropy_NL)
    ax.axhline(math.log(experts), color=GREY, linestyle="--", linewidth=1.2)
    title = (
        f"Router entropy ended at {np.mean(latest):.2f} nats, averaged over layers (uniform: "
        f"ln {experts} = {math.log(experts):.2f})"
    )
    ax.set_title(title, loc="left", fontsize=12)
    if ends:
        name_ends(ax, [*ends, (f"ln {experts}", math.log(experts), GREY)])
    return figure


def drop_rate(history: History) -> Figure:
    """Fraction of the (token, choice) assignments that were dropped."""
    kept, dropped = history.column("kept"), history.column("dropped")
    share, total = dropped / np.maximum(kept + dropped, 1), history.drop_share()
    figure, (ax,) = step_figure(history, "dropped (% of assignments)")
    end = smooth_line(ax, history, share, BLUE, "{:.2%}")
    title = (
        f"{total:.2%} of the expert assignments were dropped over the run"
        if total
        else "No expert assignment was dropped"
    )
    ax.set_title(title, loc="left", fontsize=12)
    top = max(1.05 * float(finite(share).max(initial=0.0)), 0.01)
    ax.set_ylim(-0.03 * top, top)  # keeps a line of zeros off the frame
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    name_ends(ax, [end])
    return figure


def throughput(history: History) -> Figure:
    """Tokens/s and model FLOPs utilisation with their medians, without the lines that include
    compilation.
    """
    figure, axes = step_figure(history, "tokens/s", "MFU (% of matmul rate)")
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    for ax, name, colour, form in (
        (axes[0], "tokens_per_second", BLUE, "{:,.0f}"),
        (axes[1], "mfu", GREEN, "{:.1%}"),
    ):
        values = history.steady(name)
        seen, middle = finite(values), median(values)
        if not seen.size:
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, color=GREY, ha="center")
            continue
        draw_line(ax, history.column("step"), values, colour)
        margin = 0.08 * np.ptp(seen) or 0.05 * abs(middle) or 1.0
        ax.set_ylim(max(0.0, seen.min() - margin), seen.max() + margin)
        ax.axhline(middle, color=GREY, linestyle="--", linewidth=1)
        name_ends(ax, [("median " + form.format(middle), middle, GREY)])
    drops = f" with {history.drop_share():.2%} of assignments dropped" if history.layers else ""
    axes[0].set_title(
        f"Median {median(history.steady('tokens_per_second')):,.0f} tokens/s{drops}",
        loc="left",
        fontsize=12,
    )
    return figure


def gradient(history: History) -> Figure:
    """Global gradient norm before clipping, and the learning rate."""
    norm, rate = history.column("grad_norm"), history.column("lr")
    figure, axes = step_figure(history, "gradient norm", "learning rate")
    ends = [smooth_line(axes[0], history, norm, BLUE, "{:.3g}")]
    log_if_wide(axes[0], norm)
    name_ends(axes[0], ends)
    draw_line(axes[1], history.column("step"), rate, ORANGE)
    axes[1].set_ylim(bottom=0)
    name_ends(axes[1], [(f"{last(rate):.2g}", last(rate), ORANGE)])
    title = (
        f"Gradient norm (before clipping) ended at {ends[0][1]:.3g}, learning rate at "
        f"{last(rate):.2g}"
    )
    axes[0].set_title(title, loc="left", fontsize=12)
    return figure
