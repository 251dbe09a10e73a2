"""Records of a run with placement: 2 MoE layers, 4 experts in 3 slots per device on 2 ranks (so 2
replicas a layer), data 2.
"""

from __future__ import annotations

import numpy as np

from moe_jax.placement.table import Placement

TABLE = Placement(np.array([[0, 1, 2, 3, 0, 2]] * 2), 4, 2)
LOAD = [40, 10, 30, 20]
SLOT_LOAD = [20, 10, 15, 20, 20, 15]  # 45 on rank 0, 55 on rank 1, of which 5 are dropped


def training(step: int, **changes: object) -> dict:
    layer = {
        "load": LOAD,
        "max_violation": 0.6,
        "dead_experts": 0,
        "router_entropy": 0.9,
        "dropped": 5,
        "rounds": 1,
    }
    layer |= {"device_load": [25, 20, 20, 30], "slot_load": SLOT_LOAD, "dropped_to": [0, 5]}
    return {
        "step": step,
        "ce_loss": 6.0 / step,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 50 * step,
        "tokens_per_second": 1000.0,
        "step_seconds": 9.0 if step == 1 else 0.5,
        "mfu": 0.25,
        "kept": 190,
        "dropped": 10,
        "dropped_fraction": 0.05,
        "device_load_max_over_mean": 30 / 23.75,
        "skipped": 0,
        "layers": [{"layer": index, **layer} for index in range(2)],
    } | changes


def decision(step: int, *, accepted: bool = True) -> dict:
    predicted = {"gain": 0.25, "device_load_before": [80, 20], "device_load_after": [60, 40]}
    return {
        "event": "placement",
        "step": step,
        "strategy": "balanced",
        "accepted": accepted,
        "why": "the gain pays <at once>"
        if accepted
        else "the gain of 1% is below placement.min_gain=0.02",
        "moves": 3,
        "bytes": 3 * 2**20,
        "seconds_estimated": 0.04,
        "seconds": 0.05 if accepted else None,
        "predicted": predicted
        | {"seconds_per_step": 0.4, "max_over_mean_before": 1.6, "max_over_mean_after": 1.2},
    }


def realised(step: int, of_step: int) -> dict:
    line = {
        "event": "placement_realised",
        "step": step,
        "of_step": of_step,
        "predicted_gain": 0.25,
        "realised_gain": 0.2,
    }
    return line | {
        "device_load_before": [80, 20],
        "device_load_after": [64, 36],
        "max_over_mean_before": 1.6,
        "max_over_mean_after": 1.28,
    }


def traffic(step: int) -> dict:
    """Over both layers, 10 steps: 30 rows per step from 0 to 1, 10 from 1 to 0, 60 at home."""
    sent = [[150, 150], [50, 150]]
    return {
        "event": "traffic",
        "step": step,
        "steps": 10,
        "layers": [{"layer": layer, "sent": sent} for layer in range(2)],
    }


def alert(step: int, layer: int, *, over: bool = False) -> dict:
    line = {
        "event": "alert_over" if over else "alert",
        "step": step,
        "what": "device_load",
        "layer": layer,
        "value": 5.0,
        "limit": 4.0,
    }
    return line | {"text": f"Layer {layer}: device 3 computes 5.00 times the mean load."}


def whole_run(steps: int = 6) -> list[dict]:
    """Two decisions, one refused; an alert that is over and one under way; ended with a
    checkpoint.
    """
    lines = [training(step) for step in range(1, steps + 1)]
    events = {
        2: [decision(2), alert(2, 0)],
        3: [decision(3, accepted=False)],
        4: [realised(4, 2), alert(4, 0, over=True), alert(4, 1)],
    }
    end = [
        traffic(steps),
        {"step": steps, "val_loss": 1.5, "val_tokens": 9},
        {"step": steps, "event": "checkpoint"},
    ]
    return [record for line in lines for record in (line, *events.get(line["step"], []))] + end
