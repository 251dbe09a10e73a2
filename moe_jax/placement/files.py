"""Reads a topology file: hosts, links and memory, as in configs/placement/topology.yaml."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

from moe_jax.config.load import read_yaml, section_from_dict
from moe_jax.errors import UserError
from moe_jax.placement.topology import Topology


def read_topology(path: Path, devices: int | None = None) -> Topology:
    """The topology in a YAML file, checked against the mesh's number of devices where that is given.

    Raises UserError for a file that cannot be read, a key that is unknown, missing or of the wrong type, a number out of
    range, or another number of devices.
    """
    values = read_yaml(path)
    fields = {field.name: field for field in dataclasses.fields(Topology)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the keys are {', '.join(fields)}."
            raise UserError(f"{path}: there is no key {str(key)!r}; {hint}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise UserError(f"{path} leaves out {', '.join(missing)}: give every key of configs/placement/topology.yaml but memory.")
    try:
        found: Topology = section_from_dict(Topology, values, source=str(path))
    except UserError as error:
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from error
    if devices is not None and found.devices != devices:
        raise UserError(
            f"{path} has hosts={found.hosts} x devices_per_host={found.devices_per_host} = {found.devices} devices, but the mesh has "
            f"{devices}: make them equal."
        )
    return found
