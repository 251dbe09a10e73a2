"""Deciding, by the load measured in training, whether experts should live elsewhere, and moving
them.

    replanner = Replanner(config.placement, topology, program)
    replanner.observe(flow, seconds)                       # after each step
    state, events = replanner.turn(step, state, last)  # moves experts, if that pays

A plan is made by the whole window since the last decision, and believed where one made by the
window's first half would have paid in its second: while routers drift, or loads only seem uneven,
nothing moves. A decision follows from counts and from the rates of the topology, never from a
clock: a run that is resumed, or run again, decides alike. Measured seconds are only reported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.config.schema import PlacementConfig
from moe_jax.moe.stats import RoutingCounts
from moe_jax.placement.cost import cost, link_rows, max_over_mean, planned_traffic
from moe_jax.placement.plan import plan_placement
from moe_jax.placement.schedule import schedule
from moe_jax.placement.table import Placement
from moe_jax.placement.topology import Topology
from moe_jax.runtime.platform import platform_of
from moe_jax.training.migration import Migration
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram
from moe_jax.training.traffic_window import TrafficWindow


class Estimate(NamedTuple):
    """What a table costs under a window's traffic; sums over layers, a step."""

    load_R: np.ndarray  # rows by device
    busiest: float  # rows of each layer's busiest device
    max_over_mean: float  # the mean over layers
    link: float  # rows over each layer's busiest link
    seconds: float


class Replanner:
    """Holds where experts are, what was measured since the last decision, and moves them."""

    def __init__(self, config: PlacementConfig, topology: Topology, program: TrainProgram):
        self.config, self.topology, self.program, self.placement = (
            config,
            topology,
            program,
            program.placement,
        )
        self.host_R = topology.host_of_rank(program.placement.ranks, program.mesh.shape["tensor"])
        self.migration = Migration(program) if config.replan_every else None
        self.window = self._new_window()
        self.before: TrafficWindow | None = None
        self.decided: dict[str, Any] | None = (
            None  # the newest decision that moved experts, until its gain has been seen
        )

    def _new_window(self) -> TrafficWindow:
        return TrafficWindow.empty(
            len(self.placement.physical_to_logical),
            self.placement.ranks,
            self.placement.num_experts,
        )

    def observe(self, found: RoutingCounts, seconds: float | None) -> None:
        """Counts a step's choices, given stacked over layers and on the host; None where its time
        includes a compilation.
        """
        self.window.add(found, seconds, self.config.replan_every // 2)

    def turn(
        self, step: int, state: TrainState, last: int
    ) -> tuple[TrainState, list[dict[str, Any]]]:
        """The state, its experts moved if this step decides so, and what metrics.jsonl says of it;
        `last` is the run's last step.

        The last step only tells what came of the decision before. A window too short to be tried on
        itself goes on.
        """
        due = (
            self.config.replan_every and step % self.config.replan_every == 0 and self.window.halves
        )
        if not (due or (step == last and self.window.steps)):
            return state, []
        events = [self._realised(step, self.decided)] if self.decided else []
        if step == last:
            self.decided = None
            return state, events
        state, event = self._decide(step, state, min(self.config.replan_every, last - step))
        self.decided = event if event["accepted"] else None
        self.before, self.window = self.window, self._new_window()
        return state, [*events, event]

    def _decide(
        self, step: int, state: TrainState, horizon: int
    ) -> tuple[TrainState, dict[str, Any]]:
        """What is predicted is what a plan by the window's first half would have made of its
        second, which it did not see.
        """
        window, old = self.window, self.placement
        first_LRE = window.earlier_LRE
        second_LRE = window.traffic_LRE - first_LRE
        trial = self._plan(first_LRE)
        better_L = self._worth(trial, second_LRE) < (1 - self.config.min_gain) * self._worth(
            old, second_LRE
        )

        def mixed(table):
            return _mix(better_L, table, old)

        new = mixed(self._plan(window.traffic_LRE))
        second_LRE = second_LRE / (window.steps - window.earlier)
        before, after = (self.estimate(table, second_LRE) for table in (old, mixed(trial)))
        assert self.migration is not None
        calls = schedule(old, new, self.migration.budget)
        bandwidth, latency = self._slowest_link()
        needed = sum(int(call.turns) for call in calls) * (
            self.migration.bytes_a_turn / bandwidth + latency
        )
        saved = (before.seconds - after.seconds) * horizon
        if not better_L.any():
            why = f"no layer would gain placement.min_gain={self.config.min_gain:g}"
        elif not calls:
            why = "the plan is the present table"
        elif saved <= needed:
            why = (
                f"moving would take {needed:.3g} s and save {saved:.3g} s in {horizon} steps "
                f"(estimates)"
            )
        elif self.config.strategy == "topology_aware":
            had, would = before.busiest + before.link, after.busiest + after.link
            why = (
                f"the busiest devices and links had {had:,.0f} rows a step and would have "
                f"{would:,.0f}"
            )
        else:
            why = (
                f"the busiest device had {before.max_over_mean:.2f} times the mean load and "
                f"would have {after.max_over_mean:.2f} times"
            )
        event = {
            "step": step,
            "event": "placement",
            "strategy": self.config.strategy,
            "accepted": bool(calls) and saved > needed,
            "why": why,
            "moves": 0,
            "bytes": self.migration.bytes_between(old, new),
            "seconds_estimated": needed,
            "seconds": None,
            "predicted": _comparison(before, after)
            | {
                "gain": 1 - after.max_over_mean / before.max_over_mean,
                "seconds_per_step": before.seconds - after.seconds,
            },
            "measured": {
                "step_seconds": window.step_seconds(),
                "dropped_fraction": window.dropped_fraction(),
            },
        }
        if event["accepted"]:
            state, moved = self.migration(state, old, new)
            event |= {"moves": moved.experts, "seconds": moved.seconds}
            self.placement = new
        return state, event

    def _plan(self, traffic_LRE: np.ndarray) -> Placement:
        old = self.placement
        return plan_placement(
            self.config.strategy,
            traffic_LRE,
            ranks=old.ranks,
            redundant_slots=self.config.redundant_slots,
            topology=self.topology,
            present=old,
            groups=self.program.moe.num_groups,
            tensor=self.program.mesh.shape["tensor"],
        )

    def _worth(self, placement: Placement, traffic_LRE: np.ndarray) -> np.ndarray:
        """What the strategy wants to be small, by layer."""
        found = planned_traffic(placement, traffic_LRE, self.host_R)
        balanced = self.config.strategy == "balanced"
        return (
            found.load_LR.max(-1, initial=0)
            if balanced
            else cost(found, self.host_R, self.topology.between_weight)
        )

    def estimate(self, placement: Placement, traffic_LRE: np.ndarray) -> Estimate:
        """A table's load and an estimate of the seconds a step that the busiest devices and links
        take; traffic of a step.
        """
        found = planned_traffic(placement, traffic_LRE, self.host_R)
        link = float(np.sum(link_rows(found.sent_LRR, self.host_R, self.topology.between_weight)))
        busiest = float(np.sum(found.load_LR.max(-1, initial=0)))
        mesh, model, moe = self.program.mesh.shape, self.program.model, self.program.moe
        flops = (
            3 * 2 * 3 * model.width * moe.hidden / mesh["tensor"]
        )  # of a row, forward and backward
        sent = (
            4 * model.width * jnp.dtype(model.compute_dtype).itemsize
        )  # bytes of a row, there and back, forward and backward
        platform = platform_of(self.program.mesh.devices.flat[0])
        seconds = (
            busiest * flops / platform.flops + link * sent / self.topology.bandwidth_within
        ) / mesh["data"]
        return Estimate(
            found.load_LR.sum(0),
            busiest,
            float(np.mean(max_over_mean(found.load_LR))),
            link,
            seconds,
        )

    def _slowest_link(self) -> tuple[float, float]:
        """Bytes/s that a device has for a migration and seconds a message takes, at worst."""
        topology = self.topology
        if self.host_R[-1] == 0:
            return topology.bandwidth_within, topology.latency_within
        shared = topology.bandwidth_between / topology.devices_per_host
        return min(topology.bandwidth_within, shared), topology.latency_between

    def _realised(self, step: int, decision: dict[str, Any]) -> dict[str, Any]:
        """What the window after a migration shows beside what was predicted."""
        window, predicted, measured = self.window, decision["predicted"], decision["measured"]
        before, after = predicted["max_over_mean_before"], window.max_over_mean()
        return {
            "step": step,
            "event": "placement_realised",
            "of_step": decision["step"],
            "predicted_gain": predicted["gain"],
            "realised_gain": 1 - after / before,
            "device_load_before": predicted["device_load_before"],
            "device_load_after": (window.asked_LR.sum(0) / window.steps).tolist(),
            "max_over_mean_before": before,
            "max_over_mean_after": after,
            "step_seconds_before": measured["step_seconds"],
            "step_seconds_after": window.step_seconds(),
            "dropped_fraction_before": measured["dropped_fraction"],
            "dropped_fraction_after": window.dropped_fraction(),
        }

    # What a checkpoint keeps, so that a resumed run decides as the uninterrupted one does.

    def to_json(self) -> dict[str, Any] | None:
        """The windows and the decision whose gain is still to be seen; None where nothing is ever
        decided.
        """
        if not self.config.replan_every:
            return None
        before = None if self.before is None else self.before.to_json()
        return {"window": self.window.to_json(), "before": before, "decided": self.decided}

    def restore(self, kept: dict[str, Any] | None, saved: Placement) -> None:
        """Takes up `to_json`'s form, `saved` being the checkpoint's table. With another table than
        this one counting begins anew.
        """
        same = saved.ranks == self.placement.ranks and np.array_equal(
            saved.physical_to_logical, self.placement.physical_to_logical
        )
        if kept and same and self.config.replan_every:
            self.window, self.decided = TrafficWindow.from_json(kept["window"]), kept["decided"]
            self.before = (
                None if kept["before"] is None else TrafficWindow.from_json(kept["before"])
            )

    def load_window(self) -> TrafficWindow:
        """The longer of the windows before and since the last decision."""
        return (
            self.before
            if self.before is not None and self.before.steps > self.window.steps
            else self.window
        )


def _mix(better_L: np.ndarray, new: Placement, old: Placement) -> Placement:
    """The new table in those layers, the old one in the others."""
    return Placement(
        np.where(better_L[:, None], new.physical_to_logical, old.physical_to_logical),
        old.num_experts,
        old.ranks,
    )


def _comparison(before: Estimate, after: Estimate) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for when, estimate in (("before", before), ("after", after)):
        found |= {
            f"device_load_{when}": estimate.load_R.tolist(),
            f"max_over_mean_{when}": estimate.max_over_mean,
            f"busiest_link_{when}": estimate.link,
        }
    return found


def sentence(event: dict[str, Any]) -> str:
    """What a person reads of a decision, or of what came of one."""
    if event["event"] == "placement_realised":
        return (
            f"step {event['step']}: since experts moved at step {event['of_step']} the busiest "
            f"device has "
            f"{event['max_over_mean_after']:.2f} times the mean load, before "
            f"{event['max_over_mean_before']:.2f} "
            f"({event['realised_gain']:.0%} less, {event['predicted_gain']:.0%} predicted)"
        )
    if not event["accepted"]:
        return f"step {event['step']}: experts stay where they are: {event['why']}"
    return (
        f"step {event['step']}: moved {event['moves']} experts ({event['bytes'] / 1e6:.1f} "
        f"MB) in {event['seconds']:.2f} s: {event['why']}"
    )
