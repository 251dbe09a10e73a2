"""What a person sees while a run goes on: a live bar on a terminal, a line now and then in a
pipe.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_jax.utils.units import duration

SECONDS_BETWEEN_LINES = 10.0


class RunProgress:
    """Shows training records as they come; use it as a context manager."""

    def __init__(self, steps: int, start: int, loss_unit: str = "nats a token"):
        self._steps, self._start, self._loss_unit = steps, start, loss_unit
        self._console = Console(highlight=False, soft_wrap=True)
        self._last_line = time.monotonic()
        # Step and time of the first training line, before which the step was compiled.
        self._first: tuple[int, float] | None = None
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
            )
            self._bar = Progress(
                *columns, TextColumn("left"), TimeRemainingColumn(), console=self._console
            )
            self._task = self._bar.add_task(
                "train", total=steps, completed=start, figures="compiling"
            )

    def __enter__(self) -> RunProgress:
        if self._bar:
            self._bar.start()
        elif self._start < self._steps:
            self.say("Compiling the training step.")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False)

    def train(self, record: dict[str, Any]) -> None:
        """Shows a training record."""
        figures = (
            f"loss {record['ce_loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"dropped {record['dropped_fraction']:.1%}"
        )
        step, now = record["step"], time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=step, figures=figures)
        elif (
            step == self._steps
            or self._first is None
            or now - self._last_line >= SECONDS_BETWEEN_LINES
        ):
            self._last_line = now
            self.say(f"step {step}/{self._steps}  {figures}{self._left(step, now)}")
        if self._first is None:
            self._first = step, now

    def _left(self, step: int, now: float) -> str:
        """How long the rest takes at the pace since the first line, which says nothing of it."""
        if self._first is None:
            return ""
        first, began = self._first
        return f"  left {duration((now - began) / (step - first) * (self._steps - step))}"

    def validation(self, record: dict[str, Any], layers: list[dict[str, Any]]) -> None:
        """Shows a validation record, with the experts that the newest training step used most and
        least.
        """
        self.say(
            f"step {record['step']}: validation loss {record['val_loss']:.4f} "
            f"{self._loss_unit}{extremes(layers)}"
        )


def extremes(layers: list[dict[str, Any]]) -> str:
    """The most and the least loaded experts over all layers, with their load over the even
    share.
    """
    if not layers:
        return ""
    share = np.array(
        [np.divide(layer["load"], max(np.mean(layer["load"]), 1e-9)) for layer in layers]
    )
    (hot, high), (cold, low) = (
        np.unravel_index(i, share.shape) for i in (np.argmax(share), np.argmin(share))
    )
    return (
        f"; most loaded: layer {layers[hot]['layer']} expert {high} ({share[hot, high]:.2f} x "
        f"even), "
        f"least: layer {layers[cold]['layer']} expert {low} ({share[cold, low]:.2f} x)"
    )
