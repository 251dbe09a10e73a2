"""Forecasts of held-out series in a run's report: kept by the trainer at each validation, drawn
from that file.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from moe_jax.tracking.figures.style import BLUE, GREY, ORANGE, WIDTH
from moe_jax.utils.files import replace_bytes

FORECASTS = "forecasts.npz"
SERIES = 6  # that are drawn


def keep_forecasts(
    run_dir: Path,
    context_BT: np.ndarray,
    target_BH: np.ndarray,
    quantiles_BQH: np.ndarray,
    levels: tuple[float, ...],
) -> None:
    """Keeps the first few series, in their own units, with NaN where a value is missing."""
    file = io.BytesIO()
    np.savez(
        file,
        context=context_BT[:SERIES],
        target=target_BH[:SERIES],
        quantiles=quantiles_BQH[:SERIES],
        levels=np.asarray(levels),
    )
    replace_bytes(run_dir / FORECASTS, file.getvalue())


def forecast_figures(run_dir: Path) -> dict[str, Figure]:
    """A panel per series that was kept: what came last, what was to be forecast, the median, and
    the band between the outermost levels. None where none was kept.
    """
    if not (run_dir / FORECASTS).is_file():
        return {}
    with np.load(run_dir / FORECASTS) as kept:
        context_BT, target_BH = kept["context"], kept["target"]
        quantiles_BQH, levels = kept["quantiles"], kept["levels"]
    count, steps = target_BH.shape
    shown = min(context_BT.shape[1], max(3 * steps, 96))
    past, ahead = np.arange(-shown, 0), np.arange(steps)
    middle = int(np.argmin(np.abs(levels - 0.5)))
    figure = Figure(figsize=(WIDTH, 0.5 + 1.7 * count), dpi=120, layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    for number, ax in enumerate(axes):
        quantiles_QH = quantiles_BQH[number]
        ax.plot(past, context_BT[number, -shown:], color=GREY, linewidth=1.1, label="history")
        ax.plot(ahead, target_BH[number], color=ORANGE, linewidth=1.1, label="what came")
        band = f"{levels[0]:g} to {levels[-1]:g}"
        ax.fill_between(
            ahead, quantiles_QH[0], quantiles_QH[-1], color=BLUE, alpha=0.22, lw=0, label=band
        )
        ax.plot(ahead, quantiles_QH[middle], color=BLUE, linewidth=1.5, label="median")
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.set_xlim(-shown, steps - 1)
    axes[-1].set_xlabel("steps from the end of what was read", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    return {"forecasts": figure}
