"""What a run writes of its steps into metrics.jsonl (docs/metrics.md): training lines, the traffic
over links, and decisions about placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.models.batch import SeriesBatch
from moe_jax.moe.stats import LayerStats, RoutingCounts
from moe_jax.placement.cost import max_over_mean
from moe_jax.runtime.distributed import is_first
from moe_jax.tracking.metrics import dead_experts, max_violation
from moe_jax.training.placement.decision import Decision, Estimate
from moe_jax.training.placement.migration import Moved
from moe_jax.training.placement.traffic_window import TrafficWindow
from moe_jax.training.state import StepStats, TrainState
from moe_jax.training.step import TrainProgram
from moe_jax.utils.units import less


def training_record(
    step: int,
    stats: StepStats,
    seconds: float,
    *,
    tokens: int,
    model_flops: float,
    layers: Sequence[int],
) -> dict[str, Any]:
    """A training line. `seconds` are a step's, `tokens` a batch's; `model_flops` is a step's share
    of what the machine does in a second.
    """
    measured = stats.layers
    kept, dropped = (
        (0, 0) if measured is None else (int(np.sum(measured.kept)), int(np.sum(measured.dropped)))
    )
    record = {
        "step": step,
        "loss": float(stats.loss),
        "ce_loss": float(stats.ce_loss),
        "aux_loss": float(stats.aux_loss),
        "z_loss": float(stats.z_loss),
        "grad_norm": float(stats.grad_norm),
        "lr": float(stats.lr),
        "tokens": step * tokens,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "mfu": model_flops / seconds,
        "kept": kept,
        "dropped": dropped,
        "dropped_fraction": dropped / max(kept + dropped, 1),
        "skipped": int(stats.skipped),
    }
    if measured is None:
        return record | {"layers": []}
    device_load_LNR = np.asarray(measured.counts.device_load_NR)
    load_LR = device_load_LNR.reshape(len(device_load_LNR), -1)
    record["device_load_max_over_mean"] = float(np.mean(max_over_mean(load_LR)))
    return record | {"layers": _layers(measured, layers)}


def _layers(stats: LayerStats, layers: Sequence[int]) -> list[dict[str, Any]]:
    counts: RoutingCounts = stats.counts
    return [
        {
            "layer": layer,
            "load": stats.router.load_E[i].tolist(),
            "max_violation": max_violation(stats.router.load_E[i]),
            "dead_experts": dead_experts(stats.router.load_E[i]),
            "router_entropy": float(stats.router.entropy[i]) / max(int(stats.router.tokens[i]), 1),
            "dropped": int(stats.dropped[i]),
            "dropped_to": counts.dropped_RR[i].sum(0).tolist(),
            "rounds": int(stats.rounds[i]),
            "device_load": counts.device_load_NR[i].reshape(-1).tolist(),
            "slot_load": counts.slot_load_P[i].tolist(),
        }
        for i, layer in enumerate(layers)
    ]


class LinkTraffic:
    """Rows over the links since the last event that told of them."""

    def __init__(self) -> None:
        self.sent_LRR: np.ndarray | None = None
        self.steps = 0

    def add(self, counts: RoutingCounts, steps: int) -> None:
        """The counts of some steps, summed over them and stacked over layers."""
        sent_LRR = np.asarray(counts.sent_RR, np.int64)
        self.sent_LRR = sent_LRR if self.sent_LRR is None else self.sent_LRR + sent_LRR
        self.steps += steps

    def take_event(self, step: int, layers: Sequence[int]) -> dict[str, Any]:
        """The event for metrics.jsonl; counting starts again."""
        assert self.sent_LRR is not None
        sent = [
            {"layer": layer, "sent": rows.tolist()}
            for layer, rows in zip(layers, self.sent_LRR, strict=True)
        ]
        event = {"step": step, "event": "traffic", "steps": self.steps, "layers": sent}
        self.sent_LRR, self.steps = None, 0
        return event


def placement_event(step: int, decision: Decision, moved: Moved | None) -> dict[str, Any]:
    """A decision, and the migration if there was one."""
    before, after = decision.before, decision.after
    return {
        "step": step,
        "event": "placement",
        "strategy": decision.config.strategy,
        "accepted": decision.accepted,
        "why": decision.why(),
        "moves": 0 if moved is None else moved.experts,
        "bytes": decision.migration_bytes,
        "seconds_estimated": decision.migration_seconds,
        "seconds": None if moved is None else moved.seconds,
        "predicted": {
            **_estimated("before", before),
            **_estimated("after", after),
            "gain": 1 - after.max_over_mean / before.max_over_mean,
            "seconds_per_step": before.seconds - after.seconds,
        },
        "measured": {
            "step_seconds": decision.step_seconds,
            "dropped_fraction": decision.dropped_fraction,
        },
    }


def _estimated(when: str, estimate: Estimate) -> dict[str, Any]:
    return {
        f"device_load_{when}": estimate.load_R.tolist(),
        f"max_over_mean_{when}": estimate.max_over_mean,
        f"busiest_link_{when}": estimate.link,
    }


def realised_event(step: int, decided: dict[str, Any], window: TrafficWindow) -> dict[str, Any]:
    """What the window after a migration shows, beside what `decided`, the event of its decision,
    predicted.
    """
    predicted, measured = decided["predicted"], decided["measured"]
    before, after = predicted["max_over_mean_before"], window.max_over_mean()
    return {
        "step": step,
        "event": "placement_realised",
        "of_step": decided["step"],
        "predicted_gain": predicted["gain"],
        "realised_gain": 1 - after / before,
        "device_load_before": predicted["device_load_before"],
        "device_load_after": (window.device_load_LR.sum(0) / window.steps).tolist(),
        "max_over_mean_before": before,
        "max_over_mean_after": after,
        "step_seconds_before": measured["step_seconds"],
        "step_seconds_after": window.step_seconds(),
        "dropped_fraction_before": measured["dropped_fraction"],
        "dropped_fraction_after": window.dropped_fraction(),
    }


def placement_sentence(event: dict[str, Any]) -> str:
    """A one-line message about a decision or its result."""
    if event["event"] == "placement_realised":
        return (
            f"step {event['step']}: since experts moved at step {event['of_step']} the busiest "
            f"device has {event['max_over_mean_after']:.2f} times the mean load, before "
            f"{event['max_over_mean_before']:.2f} "
            f"({less(event['realised_gain'])}, predicted {less(event['predicted_gain'])})"
        )
    if not event["accepted"]:
        return f"step {event['step']}: experts stay where they are: {event['why']}"
    return (
        f"step {event['step']}: moved {event['moves']} experts ({event['bytes'] / 1e6:.1f} "
        f"MB) in {event['seconds']:.2f} s: {event['why']}"
    )


def keep_held_out(
    run_dir: Path, program: TrainProgram, state: TrainState, batch: SeriesBatch
) -> None:
    """Keeps forecasts of held-out series for the report: those of the first process's first
    device.
    """
    quantiles = program.forecast_step(state.params, state.tables, batch)
    if not is_first():
        return
    from moe_jax.tracking.figures.forecasts import keep_forecasts  # which imports matplotlib

    context, target, forecast = (
        np.asarray(array.addressable_shards[0].data)
        for array in (batch.context, batch.target, quantiles)
    )
    keep_forecasts(run_dir, context, target, forecast, program.model.forecast.quantiles)
