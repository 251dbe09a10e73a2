"""A lower bound of the time that a program takes, and the links on which its collectives travel.

    bound = time_bound(measured, target, mesh)
    bound.seconds, bound.by

No program is faster than its model's FLOPs, its arguments and results in memory, or the bytes that
leave each device allow; it may be much slower. Rates are those of `chips.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh

from moe_jax.preflight.chips import Chip, Target
from moe_jax.preflight.measure import Measured, Sent


class Carrier(NamedTuple):
    """What carries a collective."""

    name: str
    rate: float  # bytes/s that a device can send over it


class Bound(NamedTuple):
    """Seconds that a program takes at least."""

    flops: float  # of the model's matmuls, none recomputed
    memory: float  # arguments read and results written once
    links: float  # all collectives, each kind of link beside the others
    exposed: float  # collectives beside which nothing is computed, one after another

    @property
    def seconds(self) -> float:
        """The bound: what is exposed comes on top of what is computed."""
        return max(max(self.flops, self.memory) + self.exposed, self.links)

    @property
    def by(self) -> str:
        """What decides it."""
        parts = {"FLOPs": self.flops, "memory": self.memory, "links": self.exposed or self.links}
        return max(parts, key=lambda name: parts[name])


def time_bound(program: Measured, target: Target, mesh: Mesh) -> Bound:
    """The bound of one run of a compiled program."""
    chip, loads, exposed = target.chip, dict[str, float](), 0.0
    for sent in program.collectives:
        link = link_of(sent, chip, mesh)
        loads[link.name] = loads.get(link.name, 0.0) + sent.bytes / link.rate
        exposed += (sent.bytes - sent.hidden_bytes) / link.rate
    return Bound(
        program.flops / chip.flops,
        (program.argument_bytes + program.output_bytes) / chip.memory_rate,
        max(loads.values(), default=0.0),
        exposed,
    )


def link_of(sent: Sent, chip: Chip, mesh: Mesh) -> Carrier:
    """What carries a collective: the dims of a TPU's torus along which its devices differ, a GPU's
    links within the host or the network between hosts.
    """
    members = [mesh.devices.flat[place] for place in sent.members]
    if chip.dims:
        coords = [device.coords for device in members]
        dims = [
            name
            for name, at in zip("xyz", zip(*coords, strict=True), strict=False)
            if len(set(at)) > 1
        ]
        if not dims:
            return Carrier("within the chip", chip.memory_rate)
        return Carrier(f"ICI {''.join(dims)}", chip.links * len(dims) / chip.dims)
    if chip.host == 1:
        return Carrier("this machine", chip.links)
    hosts = {place // chip.host for place in sent.members}
    if len(hosts) == 1:
        return Carrier("NVLink", chip.links)
    group, local = len(sent.members), len(sent.members) // len(hosts)
    if "all-to-all" in sent.kind:  # only what goes to other hosts
        return Carrier("network", chip.network * (group - 1) / max(group - local, 1))
    return Carrier("network", chip.network * max(local, 1))  # once for all devices of a host
