"""What a run writes of its steps: the training lines of metrics.jsonl, the links' traffic, and
traffic.json (docs/metrics.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.moe.stats import LayerStats, RoutingCounts
from moe_jax.placement.cost import max_over_mean
from moe_jax.tracking.metrics import dead_experts, max_violation
from moe_jax.training.state import StepStats


def training_record(
    step: int,
    figures: StepStats,
    seconds: float,
    *,
    tokens: int,
    model_flops: float,
    layers: Sequence[int],
) -> dict[str, Any]:
    """A training line. `seconds` are a step's, `tokens` a batch's; `model_flops` is a step's share
    of what the machine does in a second.
    """
    stats = figures.figures.layers
    kept, dropped = (
        (0, 0) if stats is None else (int(np.sum(stats.kept)), int(np.sum(stats.dropped)))
    )
    record = {
        "step": step,
        "loss": float(figures.loss),
        "ce_loss": float(figures.figures.ce_loss),
        "aux_loss": float(figures.figures.aux_loss),
        "z_loss": float(figures.figures.z_loss),
        "grad_norm": float(figures.grad_norm),
        "lr": float(figures.lr),
        "tokens": step * tokens,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "mfu": model_flops / seconds,
        "kept": kept,
        "dropped": dropped,
        "dropped_fraction": dropped / max(kept + dropped, 1),
        "skipped": int(figures.skipped),
    }
    if stats is not None:
        asked = np.asarray(stats.counts.device_load_NR)
        record["device_load_max_over_mean"] = float(
            np.mean(max_over_mean(asked.reshape(len(asked), -1)))
        )
    return record | {"layers": [] if stats is None else _layers(stats, layers)}


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


class Links:
    """Rows over the links since the last event that told of them."""

    def __init__(self) -> None:
        self.sent_LRR: np.ndarray | None = None
        self.steps = 0

    def add(self, flow: RoutingCounts) -> None:
        """A step's counts, stacked over layers."""
        sent_LRR = np.asarray(flow.sent_RR, np.int64)
        self.sent_LRR = sent_LRR if self.sent_LRR is None else self.sent_LRR + sent_LRR
        self.steps += 1

    def event(self, step: int, layers: Sequence[int]) -> dict[str, Any]:
        """What metrics.jsonl says of them; counting begins anew."""
        assert self.sent_LRR is not None
        sent = [
            {"layer": layer, "sent": rows.tolist()}
            for layer, rows in zip(layers, self.sent_LRR, strict=True)
        ]
        found = {"step": step, "event": "traffic", "steps": self.steps, "layers": sent}
        self.sent_LRR, self.steps = None, 0
        return found
