"""What training has measured since the last decision about placement."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moe_jax.moe.stats import RoutingCounts
from moe_jax.placement.cost import max_over_mean

ARRAYS = ("traffic_LRE", "earlier_LRE", "asked_LR")


@dataclasses.dataclass
class TrafficWindow:
    """Sums over its steps."""

    traffic_LRE: np.ndarray  # choices by source rank and expert
    earlier_LRE: np.ndarray  # those of the first `earlier` steps, by which a trial is planned
    asked_LR: np.ndarray  # choices by the rank whose slot they went to, dropped ones included
    steps: int = 0
    earlier: int = 0
    timed: int = 0  # steps whose time is in `seconds`: not the first of a process, which compiles
    seconds: float = 0.0
    kept: int = 0
    dropped: int = 0

    @classmethod
    def empty(cls, layers: int, ranks: int, num_experts: int) -> TrafficWindow:
        """One without steps."""
        traffic_LRE = np.zeros((layers, ranks, num_experts))
        return cls(traffic_LRE, traffic_LRE.copy(), np.zeros((layers, ranks)))

    def add(self, found: RoutingCounts, seconds: float | None, half: int) -> None:
        """One step's counts, stacked over layers; steps are earlier ones until there are `half`."""
        self.traffic_LRE += found.traffic_RE
        if self.steps < half:
            self.earlier_LRE += found.traffic_RE
            self.earlier += 1
        self.asked_LR += np.asarray(found.device_load_NR).sum(1)
        self.steps += 1
        if seconds is not None:
            self.timed, self.seconds = self.timed + 1, self.seconds + seconds
        self.kept, self.dropped = (
            self.kept + int(np.sum(found.sent_RR)),
            self.dropped + int(np.sum(found.dropped_RR)),
        )

    @property
    def halves(self) -> bool:
        """Whether there are steps to plan a trial by and others to try it on."""
        return 0 < self.earlier < self.steps

    def max_over_mean(self) -> float:
        """Of devices' loads, the mean over layers."""
        return float(np.mean(max_over_mean(self.asked_LR)))

    def step_seconds(self) -> float | None:
        """A step's time, the mean; None where none was taken."""
        return self.seconds / self.timed if self.timed else None

    def dropped_fraction(self) -> float:
        """Of all choices."""
        return self.dropped / max(self.kept + self.dropped, 1)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; counts are whole numbers."""
        return {
            name: value.astype(np.int64).tolist() if name in ARRAYS else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrafficWindow:
        """Reads `to_json`'s form."""
        return cls(**value | {name: np.array(value[name], np.float64) for name in ARRAYS})
