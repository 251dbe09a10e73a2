"""Reads measured load (a run's traffic.json, or a load file of the same form) and placement tables,
with one sentence for what is wrong.

A load file is JSON: {"version": 1, "steps": n, "num_experts": E, "layers": [numbers of the MoE
layers], "traffic": [L][R][E]}, choices that each source rank's tokens made of each expert in n
steps; or, where the sources are not known, "load": [L][E].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import UserError
from moe_jax.placement.files import _read_json
from moe_jax.utils.files import local_path, replace_text

LOAD_VERSION = 1
RUN_FILE = "traffic.json"


class MeasuredTraffic(NamedTuple):
    """Choices of experts in a window of steps."""

    traffic_LRE: np.ndarray  # float64, per step; R is 1 where the sources are not known
    layers: list[int]  # the numbers of the MoE layers in the model
    steps: int  # that the window has
    step: int | None  # at its end


def read_measured(path: Path | str) -> MeasuredTraffic:
    """The load in a file, or in the traffic.json of a run's directory.

    Raises UserError, with the layer named, for numbers of the wrong shape, negative or not finite.
    """
    path = local_path(path)
    if path.is_dir():
        if not (path / RUN_FILE).is_file():
            raise UserError(
                f"{path} has no {RUN_FILE}: give a run that has saved a checkpoint since it "
                f"measures load, or a load file."
            )
        path = path / RUN_FILE
    content = _read_json(path, "a load file or a run's directory")
    missing = [key for key in ("version", "steps", "num_experts", "layers") if key not in content]
    if missing or ("traffic" in content) == ("load" in content):
        lacks = (
            f"leaves out {', '.join(missing)}" if missing else "must have either traffic or load"
        )
        raise UserError(
            f"{path} {lacks}: a load file has version, steps, num_experts, layers, and traffic or "
            f"load."
        )
    if content["version"] != LOAD_VERSION:
        raise UserError(
            f"{path} has version {content['version']!r}: this program reads version {LOAD_VERSION}."
        )
    for key in ("steps", "num_experts"):
        if type(content[key]) is not int or content[key] < 1:
            raise UserError(f"{path}: {key}={content[key]!r} must be a whole number, at least 1.")
    layers = content["layers"]
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise UserError(
            f"{path}: layers must be a list of whole numbers, the MoE layers' numbers in the model."
        )
    traffic_LRE = _array(path, content, layers)
    return MeasuredTraffic(
        traffic_LRE / content["steps"], layers, content["steps"], content.get("step")
    )


def _array(path: Path, content: dict[str, Any], layers: list[int]) -> np.ndarray:
    """The numbers as float64 [L, R, E], each layer checked."""
    key, experts = (
        ("traffic", content["num_experts"])
        if "traffic" in content
        else ("load", content["num_experts"])
    )
    values = content[key]
    if not isinstance(values, list) or len(values) != len(layers):
        have = len(values) if isinstance(values, list) else "no list of"
        raise UserError(
            f"{path}: {key} has {have} layers and `layers` names {len(layers)}: make them equal."
        )
    parts: list[np.ndarray] = []
    for layer, value in zip(layers, values, strict=True):
        wanted = f"[source ranks][{experts}]" if key == "traffic" else f"[{experts}]"
        try:
            part = np.array(value, np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path}: {key} of layer {layer} is not {wanted} numbers: correct it."
            ) from error
        part = part[None] if key == "load" else part
        sources = parts[0].shape[0] if parts else max(part.shape[:1], default=0)
        if part.ndim != 2 or part.shape != (sources, experts) or not sources:
            shape = list(part.shape[1:] if key == "load" else part.shape)
            wanted = (
                f"[{sources}, {experts}] as in the layers before"
                if parts and key == "traffic"
                else wanted
            )
            raise UserError(
                f"{path}: {key} of layer {layer} has shape {shape}: it must be {wanted}."
            )
        wrong = np.argwhere(~(np.isfinite(part) & (part >= 0)))
        if wrong.size:
            raise UserError(
                f"{path}: {key} of layer {layer} holds {part[*wrong[0]]:g} for expert "
                f"{wrong[0][1]}: counts are finite and 0 or more."
            )
        parts.append(part)
    return np.array(parts) if parts else np.zeros((0, 1, experts))


def write_traffic(
    directory: Path, step: int, steps: int, traffic_LRE: np.ndarray, layers: Sequence[int]
) -> None:
    """Replaces the run's traffic.json, from which `moe-jax placement plan` plans."""
    text = json.dumps(
        {
            "version": LOAD_VERSION,
            "step": step,
            "steps": steps,
            "num_experts": traffic_LRE.shape[-1],
            "layers": list(layers),
            "traffic": traffic_LRE.astype(np.int64).tolist(),
        }
    )
    replace_text(directory / RUN_FILE, text + "\n")
