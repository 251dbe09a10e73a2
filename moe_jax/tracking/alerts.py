"""Alerts: one when a training line passes a limit of the `monitor` section, one when that is over.

    alerts = Alerts(config.monitor)
    for event in alerts.check(record):  # a training line of metrics.jsonl
        writer.write(event)
        print(event["text"])

`spans` reads them back from a run's events. Numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config.schema import MonitorConfig
from moe_jax.tracking.metrics import load_max_over_mean

# Up to this fraction of a limit a value is well within it; above, it neither raises nor ends an
# alert, so a value near the limit does not alternate.
WELL = 0.8
# So many training lines in a row well within the limit end an alert; a single step is too noisy.
CALM = 5

ALERT_LABELS = {
    "device_load": "device load max/mean",
    "max_violation": "max violation",
    "dead_experts": "share of experts without a token",
    "dropped": "dropped share",
}


class _Reading(NamedTuple):
    """The value of a training line for one limit, in one layer or (None) as a whole."""

    what: str
    layer: int | None
    value: float
    meaning: str
    """The value in words, with the device or expert concerned."""
    remedy: str


class Alerts:
    """The limits, and which of them are passed now. A resumed run restores this by checking its
    earlier lines again.
    """

    def __init__(self, monitor: MonitorConfig):
        self._monitor = monitor
        # For each current alert, how many lines in a row are well within its limit.
        self._calm: dict[tuple[str, int | None], int] = {}

    def check(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Event lines after a training line: `alert` when a limit is first passed, `alert_over`
        after CALM lines well within it.

        A field that is missing in the line is not checked. docs/metrics.md has the fields of the
        events.
        """
        events = []
        for reading in _readings(record):
            key, limit = (reading.what, reading.layer), getattr(self._monitor, reading.what)
            bound = f"(limit monitor.{reading.what}={limit:g})"
            if limit and reading.value > limit:
                if key not in self._calm:
                    events.append(
                        _event(
                            "alert",
                            record["step"],
                            reading,
                            limit,
                            f"{reading.meaning} {bound}: {reading.remedy}.",
                        )
                    )
                self._calm[key] = 0
            elif key in self._calm:
                self._calm[key] = self._calm[key] + 1 if reading.value <= WELL * limit else 0
                if self._calm[key] == CALM:
                    del self._calm[key]
                    text = (
                        f"{ALERT_LABELS[reading.what]} has come back to {reading.value:.3g} "
                        f"{bound}."
                    )
                    events.append(_event("alert_over", record["step"], reading, limit, text))
        return events


def _event(name: str, step: int, reading: _Reading, limit: float, text: str) -> dict[str, Any]:
    text = text if reading.layer is None else f"layer {reading.layer}: {text}"
    values = {"what": reading.what, "layer": reading.layer, "value": reading.value, "limit": limit}
    return {"step": step, "event": name, **values, "text": text[0].upper() + text[1:]}


def spans(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The alerts of a run, oldest first, each with `until`: the step at which it was over, or None
    while it lasts.

    Takes event lines of metrics.jsonl.
    """
    alerts: list[dict[str, Any]] = []
    open_now: dict[tuple[str, int | None], dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("alert", "alert_over"):
            key = (event["what"], event["layer"])
            if earlier := open_now.pop(key, None):
                earlier["until"] = event["step"]
            if event["event"] == "alert":
                alerts.append(event | {"until": None})
                open_now[key] = alerts[-1]
    return alerts


def _readings(record: dict[str, Any]) -> Iterator[_Reading]:
    """Every value of a training line that has a limit."""
    layers = record.get("layers", [])
    for layer in layers:
        load, number = np.asarray(layer["load"]), layer["layer"]
        if "device_load" in layer:
            ratio, device = (
                load_max_over_mean(layer["device_load"]),
                int(np.argmax(layer["device_load"])),
            )
            remedy = (
                "move experts with placement.strategy: balanced and placement.replan_every, "
                "or raise moe.aux_loss"
            )
            yield _Reading(
                "device_load",
                number,
                ratio,
                f"device {device} is asked for {ratio:.2f} times the mean load",
                remedy,
            )
        expert, excess = int(load.argmax()), layer["max_violation"]
        remedy = (
            "raise moe.aux_loss or moe.bias_rate, or give it replicas with "
            "placement.redundant_slots"
        )
        meaning = (
            f"expert {expert} has {1 + excess:.2f} times the mean load, max violation {excess:.2f}"
        )
        yield _Reading("max_violation", number, excess, meaning, remedy)
        dead, count = layer["dead_experts"], load.size
        remedy = "raise moe.aux_loss or moe.bias_rate, or train fewer experts"
        yield _Reading(
            "dead_experts", number, dead / count, f"{dead} of {count} experts got no token", remedy
        )
    if layers and "dropped_fraction" in record:
        share = record["dropped_fraction"]
        remedy = "raise moe.capacity_factor or moe.aux_loss, or set moe.dropless: true"
        yield _Reading(
            "dropped",
            None,
            share,
            f"{share:.1%} of the expert assignments were dropped{_most_dropped(layers)}",
            remedy,
        )


def _most_dropped(layers: list[dict[str, Any]]) -> str:
    """Where most were dropped: the layer and, if the line has it, the rank to which the pools were
    full.
    """
    worst = max(layers, key=lambda layer: layer.get("dropped", 0))
    if not worst.get("dropped"):
        return ""
    to = (
        f" on their way to rank {int(np.argmax(worst['dropped_to']))}"
        if "dropped_to" in worst
        else ""
    )
    return f", most in layer {worst['layer']}{to}"
