"""Whether experts should live elsewhere, by the load measured in training: numbers in, numbers out.

    decision = decide(window, table, prices, horizon)
    decision.accepted, decision.why(), decision.plan.new

A plan is made by the whole window since the last decision, and believed where one made by the
window's first half would have paid in its second: while routers drift, or loads only seem uneven,
nothing moves. A decision follows from counts and from the rates of the topology, never from a
clock: a run that is resumed, or run again, decides alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.config.schema import PlacementConfig
from moe_jax.placement.cost import cost, link_rows, max_over_mean, planned_traffic
from moe_jax.placement.plan import plan_placement
from moe_jax.placement.schedule import MigrationPlan, plan_migration
from moe_jax.placement.table import Placement
from moe_jax.placement.topology import Topology
from moe_jax.placement.trial import mix_layers, try_plan
from moe_jax.runtime.platform import platform_of
from moe_jax.training.placement.migration import MigrationCosts
from moe_jax.training.placement.traffic_window import TrafficWindow
from moe_jax.training.step import TrainProgram


class Estimate(NamedTuple):
    """What a table costs under a window's traffic; sums over layers, per step."""

    load_R: np.ndarray  # rows by device
    busiest: float  # rows of each layer's busiest device
    max_over_mean: float  # the mean over layers
    link: float  # rows over each layer's busiest link, those between hosts weighted
    seconds: float


@dataclass(frozen=True)
class Prices:
    """What a decision needs to know of settings, model and machine."""

    config: PlacementConfig
    topology: Topology
    host_R: np.ndarray  # the host of each rank
    groups: int  # of experts, in the router
    data: int  # devices on the mesh's other axes
    tensor: int
    row_flops: float  # of one row on one device, forward and backward
    row_bytes: int  # of one row there and back, forward and backward
    flops_per_second: float  # of a device
    migration: MigrationCosts

    @classmethod
    def of(
        cls,
        config: PlacementConfig,
        topology: Topology,
        program: TrainProgram,
        migration: MigrationCosts,
    ) -> Prices:
        """Those of a training program."""
        mesh, model, moe = program.mesh.shape, program.model, program.moe
        return cls(
            config=config,
            topology=topology,
            host_R=topology.host_of_rank(program.placement.ranks, mesh["tensor"]),
            groups=moe.num_groups,
            data=mesh["data"],
            tensor=mesh["tensor"],
            row_flops=3 * 2 * 3 * model.width * moe.hidden / mesh["tensor"],
            row_bytes=4 * model.width * jnp.dtype(model.compute_dtype).itemsize,
            flops_per_second=platform_of(program.mesh.devices.flat[0]).flops,
            migration=migration,
        )

    def plan(self, traffic_LRE: np.ndarray, present: Placement) -> Placement:
        """The strategy's table for this traffic."""
        return plan_placement(
            self.config.strategy,
            traffic_LRE,
            ranks=present.ranks,
            redundant_slots=self.config.redundant_slots,
            topology=self.topology,
            present=present,
            groups=self.groups,
            tensor=self.tensor,
        )

    def worth(self, table: Placement, traffic_LRE: np.ndarray) -> np.ndarray:
        """What the strategy wants to be small, by layer."""
        traffic = planned_traffic(table, traffic_LRE, self.host_R)
        if self.config.strategy == "balanced":
            return traffic.load_LR.max(-1, initial=0)
        return cost(traffic, self.host_R, self.topology.between_weight)

    def estimate(self, table: Placement, traffic_LRE: np.ndarray) -> Estimate:
        """A table's load, and an estimate of the seconds per step that the busiest devices and
        links take; traffic of a step.
        """
        traffic = planned_traffic(table, traffic_LRE, self.host_R)
        links = link_rows(traffic.sent_LRR, self.host_R, self.topology.between_weight)
        link, busiest = float(np.sum(links)), float(np.sum(traffic.load_LR.max(-1, initial=0)))
        computing = busiest * self.row_flops / self.flops_per_second
        sending = link * self.row_bytes / self.topology.bandwidth_within
        return Estimate(
            load_R=traffic.load_LR.sum(0),
            busiest=busiest,
            max_over_mean=float(np.mean(max_over_mean(traffic.load_LR))),
            link=link,
            seconds=(computing + sending) / self.data,
        )

    def migration_seconds(self, plan: MigrationPlan) -> float:
        """An estimate of what a migration takes, at the rates of the slowest link."""
        topology = self.topology
        bandwidth, latency = topology.bandwidth_within, topology.latency_within
        if self.host_R[-1] > 0:
            shared = topology.bandwidth_between / topology.devices_per_host
            bandwidth, latency = min(bandwidth, shared), topology.latency_between
        return plan.turns * (self.migration.bytes_per_turn / bandwidth + latency)


@dataclass(frozen=True)
class Decision:
    """What was planned, what it would cost and what it would bring."""

    config: PlacementConfig
    plan: MigrationPlan
    gains: bool  # whether any layer would gain placement.min_gain
    horizon: int  # steps in which it must pay
    before: Estimate
    after: Estimate
    migration_seconds: float  # an estimate
    migration_bytes: int
    step_seconds: float | None  # measured, only to be reported
    dropped_fraction: float

    @property
    def saved_seconds(self) -> float:
        """What would be saved until the horizon, an estimate."""
        return (self.before.seconds - self.after.seconds) * self.horizon

    @property
    def accepted(self) -> bool:
        """Whether experts move."""
        return bool(self.plan.calls) and self.saved_seconds > self.migration_seconds

    def why(self) -> str:
        """The reason, as a clause."""
        before, after = self.before, self.after
        if not self.gains:
            return f"no layer would gain placement.min_gain={self.config.min_gain:g}"
        if not self.plan.calls:
            return "the plan is the present table"
        if not self.accepted:
            return (
                f"moving would take {self.migration_seconds:.3g} s and save "
                f"{self.saved_seconds:.3g} s in {self.horizon} steps (estimates)"
            )
        if self.config.strategy == "topology_aware":
            had, would = before.busiest + before.link, after.busiest + after.link
            return (
                f"the busiest devices and links cost {had:,.0f} rows per step (those between "
                f"hosts weighted) and would cost {would:,.0f}"
            )
        return (
            f"the busiest device had {before.max_over_mean:.2f} times the mean load and "
            f"would have {after.max_over_mean:.2f} times"
        )


def decide(window: TrafficWindow, table: Placement, prices: Prices, horizon: int) -> Decision:
    """Whether to leave `table`, for steps whose traffic is as the window's.

    What is predicted is what a plan by the window's first half would have made of its second, which
    it did not see.
    """
    first_LRE = window.earlier_LRE
    second_LRE = window.traffic_LRE - first_LRE
    halves = (first_LRE, second_LRE)
    trial, better_L = try_plan(prices.plan, prices.worth, halves, table, prices.config.min_gain)
    new = mix_layers(better_L, prices.plan(window.traffic_LRE, table), table)
    second_LRE = second_LRE / (window.steps - window.earlier)
    plan = plan_migration(table, new, prices.migration.budget)
    return Decision(
        config=prices.config,
        plan=plan,
        gains=bool(better_L.any()),
        horizon=horizon,
        before=prices.estimate(table, second_LRE),
        after=prices.estimate(mix_layers(better_L, trial, table), second_LRE),
        migration_seconds=prices.migration_seconds(plan),
        migration_bytes=plan.sent * prices.migration.expert_bytes,
        step_seconds=window.step_seconds(),
        dropped_fraction=window.dropped_fraction(),
    )
