"""Steps that were started and whose statistics are still on the device.

pending = PendingSteps()
pending.start()                     # before a step, also before it reads its batch
state, stats = program.train_step(state, batch)
pending.add(stats)
fetched = pending.fetch()           # waits for the device: now and then, not after each step
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.stats import RoutingCounts
from moe_jax.training.state import StepStats


class FetchedSteps(NamedTuple):
    """What some steps measured, on the host."""

    stats: StepStats  # of the newest step
    counts: RoutingCounts | None  # summed over the steps, stacked over layers
    steps: int
    seconds: float


class PendingSteps:
    """The newest step's statistics, and the sum of the routing counts of all of them, as arrays of
    the device.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.steps = 0
        self._stats: StepStats | None = None
        self._counts: RoutingCounts | None = None
        self._began: float | None = None

    def start(self) -> None:
        """Starts the clock, where it does not run yet."""
        if self._began is None:
            self._began = time.perf_counter()

    def add(self, stats: StepStats) -> None:
        """Takes a step's statistics, which the device may still be computing."""
        self._stats = stats
        self.steps += 1
        if stats.layers is not None:
            counts = stats.layers.counts
            self._counts = counts if self._counts is None else _sum(self._counts, counts)

    def fetch(self) -> FetchedSteps:
        """Waits for the steps and brings what they measured to the host."""
        assert self._stats is not None and self._began is not None
        stats, counts = jax.device_get((self._stats, self._counts))
        fetched = FetchedSteps(stats, counts, self.steps, time.perf_counter() - self._began)
        self._clear()
        return fetched


@jax.jit
def _sum(total: Any, counts: Any) -> Any:
    return jax.tree.map(jnp.add, total, counts)


class StepClock:
    """The mean time of the steps since the last training line."""

    def __init__(self) -> None:
        self._seconds, self._steps = 0.0, 0

    def add(self, seconds: float, steps: int) -> None:
        """Some steps and the time that they took."""
        self._seconds, self._steps = self._seconds + seconds, self._steps + steps

    def take_mean(self) -> float:
        """Seconds per step; counting starts again."""
        mean = self._seconds / self._steps
        self._seconds, self._steps = 0.0, 0
        return mean
