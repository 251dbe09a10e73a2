"""What connects the devices: hosts, devices a host, and what the links within and between hosts
carry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moe_jax.errors import UserError


@dataclass(frozen=True)
class Topology:
    """Hosts of equally many devices, in the order of the mesh (data, expert, tensor), and their
    links.

    Raises UserError for a number that no machine has.
    """

    hosts: int
    devices_per_host: int
    bandwidth_within: float  # bytes/s in or out of a device, to others of its host
    bandwidth_between: float  # bytes/s in or out of a host, which its devices share
    latency_within: float  # s a message
    latency_between: float  # s a message
    memory: int | None = None  # bytes a device

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
        """Devices in all."""
        return self.hosts * self.devices_per_host

    @property
    def between_weight(self) -> float:
        """How many times longer a row takes over a host's link than over a device's:
        bandwidth_within / bandwidth_between.
        """
        return self.bandwidth_within / self.bandwidth_between

    def host_of_rank(self, ranks: int, tensor: int = 1) -> np.ndarray:
        """The host of each rank of the expert axis, int32 [R], counted from 0, in a mesh whose
        `tensor` axis has that size.

        The mesh puts its devices (data, expert, tensor) in order, so a data row is ranks * tensor
        devices in a run; each must lie over hosts as the first does. Raises UserError where it does
        not, or the devices are not whole rows.
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
                f"change mesh.tensor."
            )
        if row < self.devices and row % host and host % row:
            raise UserError(
                f"The topology's {host} devices a host cut the mesh's data rows of {row} devices "
                f"in different places: "
                "make one a multiple of the other."
            )
        return (np.arange(ranks) * tensor // host).astype(np.int32)


def one_host(ranks: int) -> np.ndarray:
    """Where no topology is known: all ranks on one host, int32 [R]."""
    return np.zeros(ranks, np.int32)
