"""What training has measured since the last decision about placement."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moe_jax.moe.stats import RoutingCounts
from moe_jax.placement.cost import max_over_mean


@dataclasses.dataclass
class TrafficWindow:
    """Sums over its steps."""

    traffic_LRE: np.ndarray  # choices by source rank and expert
    earlier_LRE: np.ndarray  # those of the first `earlier` steps, by which a trial is planned
    device_load_LR: np.ndarray  # choices by the rank whose slot they went to, dropped ones included
    half: int  # how many steps are the earlier ones; 0 where nothing is ever decided
    steps: int = 0
    earlier: int = 0
    timed: int = 0  # steps whose time is in `seconds`: not the first of a process, which compiles
    seconds: float = 0.0
    kept: int = 0
    dropped: int = 0

    @classmethod
    def empty(cls, layers: int, ranks: int, num_experts: int, half: int) -> TrafficWindow:
        """One without steps."""
        traffic_LRE = np.zeros((layers, ranks, num_experts))
        return cls(traffic_LRE, traffic_LRE.copy(), np.zeros((layers, ranks)), half)

    @property
    def missing_earlier(self) -> int:
        """How many earlier steps are still to come; `add` never takes steps on both sides."""
        return max(self.half - self.steps, 0)

    def add(self, counts: RoutingCounts, steps: int, seconds: float | None) -> None:
        """Counts of some steps, summed over them and stacked over layers, with their time."""
        assert not 0 < self.missing_earlier < steps, "the window's halves would mix"
        self.traffic_LRE += counts.traffic_RE
        if self.missing_earlier:
            self.earlier_LRE += counts.traffic_RE
            self.earlier += steps
        self.device_load_LR += np.asarray(counts.device_load_NR).sum(1)
        self.steps += steps
        if seconds is not None:
            self.timed, self.seconds = self.timed + steps, self.seconds + seconds
        self.kept += int(np.sum(counts.sent_RR))
        self.dropped += int(np.sum(counts.dropped_RR))

    @property
    def halves(self) -> bool:
        """Whether there are steps to plan a trial by and others to try it on."""
        return 0 < self.earlier < self.steps

    def max_over_mean(self) -> float:
        """Of devices' loads, the mean over layers."""
        return float(np.mean(max_over_mean(self.device_load_LR)))

    def step_seconds(self) -> float | None:
        """A step's time, the mean; None where none was taken."""
        return self.seconds / self.timed if self.timed else None

    def dropped_fraction(self) -> float:
        """Of all choices."""
        return self.dropped / max(self.kept + self.dropped, 1)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; counts are whole numbers."""
        return {
            "traffic_LRE": self.traffic_LRE.astype(np.int64).tolist(),
            "earlier_LRE": self.earlier_LRE.astype(np.int64).tolist(),
            "asked_LR": self.device_load_LR.astype(np.int64).tolist(),
            "steps": self.steps,
            "earlier": self.earlier,
            "timed": self.timed,
            "seconds": self.seconds,
            "kept": self.kept,
            "dropped": self.dropped,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], half: int) -> TrafficWindow:
        """Reads `to_json`'s form."""
        return cls(
            traffic_LRE=np.array(value["traffic_LRE"], np.float64),
            earlier_LRE=np.array(value["earlier_LRE"], np.float64),
            device_load_LR=np.array(value["asked_LR"], np.float64),
            half=half,
            steps=value["steps"],
            earlier=value["earlier"],
            timed=value["timed"],
            seconds=value["seconds"],
            kept=value["kept"],
            dropped=value["dropped"],
        )
