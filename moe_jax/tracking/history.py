"""A run's metrics.jsonl as columns, and what the report computes from them. Numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.tracking.metrics import is_number, iter_metrics, load_max_over_mean
from moe_jax.utils.files import local_path

COUNTS = ("load", "device_load", "slot_load", "dropped_to")  # lists in the record of a layer


@dataclass(frozen=True, kw_only=True)
class History:
    """Columns of N training lines, M validation lines, L MoE layers and E experts.

    A value that is missing or null is NaN. Without MoE layers L and E are 0.
    """

    train: dict[str, np.ndarray]  # float64 [N] by name of the scalar, `step` included
    # bool [N]: False for the first line of a process, whose time includes compilation.
    after_compile: np.ndarray
    validation: dict[str, np.ndarray]  # float64 [M] by name of the scalar; may be empty
    events: list[dict[str, Any]]  # without those of traffic
    traffic: dict[str, Any] | None  # the newest traffic event
    layers: list[int]  # [L] indices of the MoE layers in the model
    load_NLE: np.ndarray  # float32 counts, by logical expert
    max_violation_NL: np.ndarray
    router_entropy_NL: np.ndarray  # nats
    device_load_NL: np.ndarray  # load of the busiest device divided by the mean
    # N arrays of choices by slot, before drops, float32 [L, P]; [L, 0] if a line has none.
    slot_load: list[np.ndarray]

    def column(self, name: str) -> np.ndarray:
        """The scalar `name` of the training lines, float64 [N]; NaN where it is missing."""
        return self.train.get(name, np.full_like(self.train["step"], np.nan))

    def steady(self, name: str) -> np.ndarray:
        """`column(name)` with NaN in the lines whose time includes compilation, unless there are no
        others.
        """
        return np.where(self.after_compile | ~self.after_compile.any(), self.column(name), np.nan)

    def drop_share(self) -> float:
        """Dropped fraction of all logged (token, choice) assignments; NaN if none was logged."""
        dropped, kept = finite(self.column("dropped")).sum(), finite(self.column("kept")).sum()
        return float(dropped / (kept + dropped)) if kept + dropped else math.nan


def read_history(path: Path | str) -> History:
    """Reads a metrics.jsonl into columns. Raises UserError if it is missing, damaged, or has no
    training line.
    """
    path = local_path(path)
    train: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    traffic = None
    after_compile: list[bool] = []
    compiles = True  # whether the time of the next training line includes compilation
    for record in iter_metrics(path):
        if record.get("event") == "traffic":
            traffic = record  # one matrix per layer: only the newest is kept
        elif "event" in record:
            events.append(record)
            compiles = compiles or record["event"] == "resumed"
        elif "val_loss" in record:
            validation.append(record)
        else:
            # Python's integers take ten times the memory of an array's, and a long run with many
            # experts has millions.
            record["layers"] = [
                {
                    name: np.asarray(value, np.float32) if name in COUNTS else value
                    for name, value in layer.items()
                }
                for layer in record.get("layers", [])
            ]
            for layer in record["layers"]:
                layer["device_max_over_mean"] = (
                    load_max_over_mean(layer["device_load"]) if "device_load" in layer else None
                )
            train.append(record)
            after_compile.append(not compiles)
            compiles = False
    if not train:
        raise UserError(
            f"{path} has no training line yet: let the run reach its first train.log_every steps."
        )
    return History(
        train=_columns(train),
        after_compile=np.array(after_compile),
        validation=_columns(validation),
        events=events,
        traffic=traffic,
        layers=_layer_indices(train, path),
        load_NLE=_layer_load(train),
        max_violation_NL=_layer_column(train, "max_violation"),
        router_entropy_NL=_layer_column(train, "router_entropy"),
        device_load_NL=_layer_column(train, "device_max_over_mean"),
        slot_load=[_slot_load(record["layers"]) for record in train],
    )


def decisions(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The placement decisions among the events of a run, oldest first.

    Each also has `realised`, the event with its measured effect, or None, and `predicted_gain`.
    """
    realised = {
        event["of_step"]: event for event in events if event["event"] == "placement_realised"
    }
    return [
        event
        | {
            "realised": realised.get(event["step"]),
            "predicted_gain": event["predicted"]["gain"],
        }
        for event in events
        if event["event"] == "placement"
    ]


def measured_link_rows(traffic: dict[str, Any]) -> np.ndarray:
    """Rows per step from source rank to destination rank, float64 [R, R], of all MoE layers of a
    traffic event together.
    """
    return np.sum([layer["sent"] for layer in traffic["layers"]], axis=0) / max(traffic["steps"], 1)


def describe_links(rows_RR: np.ndarray) -> str:
    """The busiest link between two ranks, compared with the mean, and the fraction of rows that
    leave their device.
    """
    ranks = len(rows_RR)
    links = np.where(np.eye(ranks, dtype=bool), 0, rows_RR)
    if not links.any():
        return "all rows stay on their device"
    source, destination = np.unravel_index(links.argmax(), links.shape)
    times = links.max() * ranks * (ranks - 1) / links.sum()
    return (
        f"{source} to {destination} is busiest, {links.max():,.0f} rows ({times:.2f} x mean); "
        f"{links.sum() / rows_RR.sum():.0%} travel"
    )


def finite(values: np.ndarray) -> np.ndarray:
    """The finite values, float64 [n]."""
    return values[np.isfinite(values)]


def first(values: np.ndarray) -> float:
    """The first finite value, or NaN."""
    return float(finite(values)[0]) if finite(values).size else math.nan


def last(values: np.ndarray) -> float:
    """The last finite value, or NaN."""
    return float(finite(values)[-1]) if finite(values).size else math.nan


def median(values: np.ndarray) -> float:
    """The median of the finite values, or NaN."""
    return float(np.median(finite(values))) if finite(values).size else math.nan


def running_mean(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Running mean of `values` [N, ...] over a window of N / 50 rows that ends at each row; returns
    it and the window.

    Values that are not finite are left out; if a window has no finite value, its mean is NaN.
    """
    window = max(1, len(values) // 50)
    valid = np.isfinite(values)
    sums, counts = np.where(valid, values, 0.0).cumsum(0), valid.cumsum(0)
    sums[window:], counts[window:] = (
        sums[window:] - sums[:-window],
        counts[window:] - counts[:-window],
    )
    return np.divide(sums, counts, out=np.full(values.shape, np.nan), where=counts > 0), window


def relative_load(
    step: np.ndarray, load_NLE: np.ndarray, max_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Load divided by the mean of its layer (1 is even), in at most `max_bins` spans of steps.

    Takes `step` [N] and counts `load_NLE`. Returns the edges of the spans [B + 1], in steps, and
    the ratio [B, L, E]; a layer without tokens has ratio 0.
    """
    starts = np.unique(
        np.linspace(0, len(step), min(len(step), max_bins), endpoint=False).astype(int)
    )
    load_BLE = np.add.reduceat(load_NLE, starts, axis=0)
    mean_BL1 = load_BLE.mean(-1, keepdims=True)
    ratio_BLE = np.divide(load_BLE, mean_BL1, out=np.zeros_like(load_BLE), where=mean_BL1 > 0)
    gap = np.diff(step) if len(step) > 1 else np.ones(1)
    inner = (step[starts[1:] - 1] + step[starts[1:]]) / 2
    return np.concatenate([[step[0] - gap[0] / 2], inner, [step[-1] + gap[-1] / 2]]), ratio_BLE


def _columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Numeric fields of `records` as float64 [len(records)] by name; null and missing are NaN."""
    names = dict.fromkeys(
        name for record in records for name, value in record.items() if is_number(value)
    )
    return {name: np.array([record.get(name) for record in records], np.float64) for name in names}


def _layer_indices(train: list[dict[str, Any]], path: Path) -> list[int]:
    indices = [layer["layer"] for layer in train[0]["layers"]]
    for record in train:
        if [layer["layer"] for layer in record["layers"]] != indices:
            raise UserError(
                f"{path} lists other MoE layers at step {record['step']} than at step "
                f"{train[0]['step']}: keep one run per file."
            )
    return indices


def _layer_column(train: list[dict[str, Any]], name: str) -> np.ndarray:
    values = np.array(
        [[layer.get(name) for layer in record["layers"]] for record in train], np.float64
    )
    return values.reshape(len(train), -1)


def _layer_load(train: list[dict[str, Any]]) -> np.ndarray:
    load = np.array([[layer["load"] for layer in record["layers"]] for record in train], np.float32)
    return load if load.ndim == 3 else np.zeros((len(train), 0, 0), np.float32)


def _slot_load(layers: list[dict[str, Any]]) -> np.ndarray:
    load = [layer["slot_load"] for layer in layers if "slot_load" in layer]
    return (
        np.array(load)
        if load and len(load) == len(layers)
        else np.zeros((len(layers), 0), np.float32)
    )
