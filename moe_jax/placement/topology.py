"""What connects the devices: hosts, devices per host, bandwidth within and between hosts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moe_jax.errors import UserError


@dataclass(frozen=True)
class Topology:
    """Hosts with equally many devices, in the order of the mesh (data, expert, tensor), and their
    links.

    Raises UserError for a number that is impossible.
    """

    hosts: int
    devices_per_host: int
    bandwidth_within: float  # bytes/s in or out of a device, to others of its host
    bandwidth_between: float  # bytes/s in or out of a host, shared by its devices
    latency_within: float  # s per message
    latency_between: float  # s per message
    memory: int | None = None  # bytes per device

    def __post_init__(self) -> None:
        for key in ("hosts", "devices_per_host", "bandwidth_within", "bandwidth_between", "memory"):
            value = getattr(self, key)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(
                    f"The topology has {key}={value}: it must be a finite number above 0."
                )
        for key in ("latency_within", "latency_between"):
            value = getattr(self, key)
            if not (value >= 0 and math.isfinite(value)):
                raise UserError(
                    f"The topology has {key}={value}: it must be a finite number of seconds, 0 or "
                    f"more."
                )

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.hosts * self.devices_per_host

    @property
    def between_weight(self) -> float:
        """How many times longer a row takes over the link of a host than over that of a device:
        bandwidth_within / bandwidth_between.
        """
        return self.bandwidth_within / self.bandwidth_between

    def host_of_rank(self, ranks: int, tensor: int = 1) -> np.ndarray:
        """The host of each rank of the expert axis, int32 [R], counted from 0, in a mesh with a
        `tensor` axis of that size.

        The mesh orders its devices by (data, expert, tensor), so a data row is ranks * tensor
        consecutive devices. Raises UserError if the rows are not distributed over hosts in the same
        way, or the devices are not whole rows.
        """
        row, host = ranks * tensor, self.devices_per_host
        if self.devices % row:
            raise UserError(
                f"The topology has {self.hosts} hosts x {host} devices = {self.devices}, which "
                f"{ranks} ranks x tensor={tensor} "
                "do not divide: give the topology of the mesh's own devices."
            )
        if host % tensor:
            raise UserError(
                f"Groups of tensor={tensor} devices do not fit into hosts of {host} devices: "
                f"give the topology of the mesh's own devices, or change mesh.tensor."
            )
        if row < self.devices and row % host and host % row:
            raise UserError(
                f"The topology's {host} devices per host cut the mesh's data rows of {row} devices "
                f"in different places: "
                "make one a multiple of the other."
            )
        return (np.arange(ranks) * tensor // host).astype(np.int32)


def one_host(ranks: int) -> np.ndarray:
    """All ranks on one host, int32 [R]: what is assumed without a topology."""
    return np.zeros(ranks, np.int32)
