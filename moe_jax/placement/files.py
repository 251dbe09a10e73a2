"""Reads the files of placement: tables in JSON, and topologies in YAML as in
configs/placement/topology.yaml.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config.load import read_yaml, section_from_dict
from moe_jax.config.schema import MeshConfig, PlacementConfig
from moe_jax.errors import UserError
from moe_jax.placement.table import EMPTY, Placement
from moe_jax.placement.topology import Topology
from moe_jax.utils.files import local_path


def read_topology(path: Path, devices: int | None = None) -> Topology:
    """The topology in a YAML file; if `devices` is given, it must have so many.

    Raises UserError for a file that cannot be read, a key that is unknown, missing or of the wrong
    type, a number out of range, or another number of devices.
    """
    values = read_yaml(path, "a topology in YAML, such as configs/placement/topology.yaml")
    fields = {field.name: field for field in dataclasses.fields(Topology)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=2, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"the keys are {', '.join(fields)}."
            )
            raise UserError(f"{path}: there is no key {str(key)!r}; {hint}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise UserError(
            f"{path} leaves out {', '.join(missing)}: give every key of "
            f"configs/placement/topology.yaml except memory."
        )
    try:
        topology: Topology = section_from_dict(Topology, values, source=str(path))
    except UserError as error:
        raise (
            error if str(error).startswith(str(path)) else UserError(f"{path}: {error}")
        ) from error
    if devices is not None and topology.devices != devices:
        raise UserError(
            f"{path} has hosts={topology.hosts} x devices_per_host={topology.devices_per_host} = "
            f"{topology.devices} devices, but the mesh has {devices}: make them equal."
        )
    return topology


def configured_topology(placement: PlacementConfig, mesh: MeshConfig) -> Topology | None:
    """That of placement.topology, if there is one. Raises UserError as `read_topology` does, and
    for one whose hosts cut the mesh's rows.
    """
    if placement.topology is None:
        return None
    topology = read_topology(local_path(placement.topology), devices=mesh.size)
    topology.host_of_rank(mesh.expert, mesh.tensor)
    return topology


def read_table(
    path: Path,
    *,
    what: str = "a placement table",
    layers: int | None = None,
    num_experts: int | None = None,
    ranks: int | None = None,
    max_experts_per_device: int | None = None,
) -> Placement:
    """A placement table that `moe-jax placement plan --out` wrote; sizes that are given must be
    those of the table. `what` is what may be at the path, for the messages.

    Raises UserError for a table of another size; and, naming layer and expert, for one that leaves
    out an expert, has it twice on a device, or puts more than `max_experts_per_device` on one.
    """
    value = _read_json(path, what)
    keys = ("version", "num_experts", "num_slots", "physical_to_logical")
    missing = [key for key in keys if key not in value]
    if missing:
        raise UserError(
            f"{path} leaves out {', '.join(missing)}: give a table that `moe-jax placement plan "
            f"--out` wrote."
        )
    try:
        table = Placement.from_json(value)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: physical_to_logical is not a list for each layer of "
            f"num_slots={value['num_slots']!r} whole numbers: correct it."
        ) from error
    has = {
        "layers": len(table.physical_to_logical),
        "experts": table.num_experts,
        "devices": table.ranks,
    }
    for (name, number), wanted in zip(has.items(), (layers, num_experts, ranks), strict=True):
        if wanted is not None and number != wanted:
            raise UserError(
                f"{path} is a table for {number} {name}, but {wanted} are needed: plan one for "
                f"this model and mesh."
            )
    held_LR = np.sum(table.by_rank != EMPTY, axis=-1)
    if max_experts_per_device is not None and held_LR.max(initial=0) > max_experts_per_device:
        layer, rank = np.argwhere(held_LR > max_experts_per_device)[0]
        last = table.by_rank[layer, rank][table.by_rank[layer, rank] != EMPTY][
            max_experts_per_device
        ]
        raise UserError(
            f"{path}: layer {layer} puts {held_LR[layer, rank]} experts on device {rank}, and "
            f"placement.max_experts_per_device="
            f"{max_experts_per_device}: move expert {last} to another device."
        )
    return table


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; give {what}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give {what}.") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError included
        raise UserError(f"{path} is not JSON: give {what}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: give {what}.")
    return value
