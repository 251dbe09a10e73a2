"""Keeps what a run measures for its placement, and moves experts when a decision says so.

    replanner = Replanner(config.placement, topology, program)
    replanner.observe(counts, steps, seconds)                # after each fetch of statistics
    state, events = replanner.replan(step, state, last)      # at steps of which `due` is true

placement_decision.py decides, migration.py moves, records.py says what metrics.jsonl holds of both.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_jax.config.schema import PlacementConfig
from moe_jax.moe.stats import RoutingCounts
from moe_jax.placement.table import Placement
from moe_jax.placement.topology import Topology
from moe_jax.training.placement.decision import Prices, decide
from moe_jax.training.placement.migration import Migration
from moe_jax.training.placement.traffic_window import TrafficWindow
from moe_jax.training.records import placement_event, realised_event
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram


class Replanner:
    """Where experts are, and what was measured since the last decision."""

    def __init__(self, config: PlacementConfig, topology: Topology, program: TrainProgram):
        self.config, self.placement = config, program.placement
        self.migration = Migration(program) if config.replan_every else None
        if self.migration is not None:
            self.prices = Prices.of(config, topology, program, self.migration.costs)
        self.window = self._new_window()
        self.previous: TrafficWindow | None = None
        # The event of the newest decision that moved experts, until its gain has been seen.
        self.decided: dict[str, Any] | None = None

    @property
    def _half(self) -> int:
        return self.config.replan_every // 2

    def _new_window(self) -> TrafficWindow:
        table = self.placement
        layers = len(table.physical_to_logical)
        return TrafficWindow.empty(layers, table.ranks, table.num_experts, self._half)

    def observe(self, counts: RoutingCounts, steps: int, seconds: float | None) -> None:
        """Counts of some steps, summed over them, stacked over layers and on the host; None where
        their time includes a compilation.
        """
        self.window.add(counts, steps, seconds)

    def due(self, step: int, last: int, unseen: int = 0) -> bool:
        """Whether `replan` has something to do at this step, of a run with `last` steps, once the
        newest `unseen` steps are observed.
        """
        window, every = self.window, self.config.replan_every
        steps = window.steps + unseen
        earlier = window.earlier + min(unseen, window.missing_earlier)
        decides = every > 0 and step % every == 0 and 0 < earlier < steps
        return decides or (step == last and steps > 0)

    def must_observe(self, step: int, last: int, unseen: int) -> bool:
        """Whether the newest `unseen` steps must be observed now: to decide, or because the
        window's first half ends with them.
        """
        return unseen == self.window.missing_earlier or self.due(step, last, unseen)

    def replan(
        self, step: int, state: TrainState, last: int
    ) -> tuple[TrainState, list[dict[str, Any]]]:
        """The state, its experts moved if this step decides so, and the events for metrics.jsonl.

        The last step only tells what came of the decision before. A window too short to be tried on
        itself goes on.
        """
        if not self.due(step, last):
            return state, []
        events = [realised_event(step, self.decided, self.window)] if self.decided else []
        if step == last:
            self.decided = None
            return state, events
        assert self.migration is not None
        horizon = min(self.config.replan_every, last - step)
        decision = decide(self.window, self.placement, self.prices, horizon)
        moved = None
        if decision.accepted:
            state, moved = self.migration(state, decision.plan)
            self.placement = decision.plan.new
        event = placement_event(step, decision, moved)
        self.decided = event if decision.accepted else None
        self.previous, self.window = self.window, self._new_window()
        return state, [*events, event]

    # What a checkpoint keeps, so that a resumed run decides as the uninterrupted one does.

    def to_json(self) -> dict[str, Any] | None:
        """The windows and the decision whose gain is still to be seen; None where nothing is ever
        decided.
        """
        if not self.config.replan_every:
            return None
        previous = None if self.previous is None else self.previous.to_json()
        return {"window": self.window.to_json(), "before": previous, "decided": self.decided}

    def restore(self, kept: dict[str, Any] | None, saved: Placement) -> None:
        """Takes up `to_json`'s form, `saved` being the checkpoint's table. With another table than
        this one, counting starts again.
        """
        same = saved.ranks == self.placement.ranks and np.array_equal(
            saved.physical_to_logical, self.placement.physical_to_logical
        )
        if not (kept and same and self.config.replan_every):
            return
        self.window = TrafficWindow.from_json(kept["window"], self._half)
        if kept["before"] is not None:
            self.previous = TrafficWindow.from_json(kept["before"], self._half)
        self.decided = kept["decided"]

    def longer_window(self) -> TrafficWindow:
        """The longer of the windows before and since the last decision."""
        if self.previous is not None and self.previous.steps > self.window.steps:
            return self.previous
        return self.window
