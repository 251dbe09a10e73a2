"""The chips that a run is to be compiled for: how --topology names them, and what they can do.

    target = find_target("v5p:4x4x4")     # 64 devices, each with a memory of 95 GiB

Rates and memories are those that the makers publish; they are assumptions of a bound, and nothing
else depends on them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass

import jax

from moe_jax.config.schema import DevicesConfig
from moe_jax.errors import UserError
from moe_jax.runtime.compile_only import tpu_devices
from moe_jax.runtime.devices import use_devices
from moe_jax.runtime.platform import published_rates
from moe_jax.utils.units import one_of_these


@dataclass(frozen=True)
class Chip:
    """One device of a kind."""

    name: str
    memory: float  # bytes
    flops: float  # of dense matmuls in bf16, FLOP/s
    memory_rate: float  # bytes/s
    links: float  # bytes/s that it can send over all its links
    dims: int  # of the torus that the links form; 0: a switch within the host
    host: int = 1  # devices of a host, where others are reached over a network
    network: float = 0.0  # bytes/s that a device can send to other hosts


GIB = 2**30
GPUS_PER_HOST = 8  # which share its network


def _known(name: str, memory: float, memory_rate: float, dims: int = 0) -> Chip:
    """A kind of device whose rates are listed; a GPU where its links form no torus."""
    rates = published_rates(name)
    assert rates is not None, name
    chip = Chip(name, memory, rates.flops, memory_rate, rates.link_within, dims)
    if dims:
        return chip
    return dataclasses.replace(chip, host=GPUS_PER_HOST, network=rates.link_between / GPUS_PER_HOST)


# docs.cloud.google.com/tpu/docs; a chip of tpu7x is two devices.
TPUS = {
    "v4": _known("TPU v4", 32 * GIB, 1.2e12, 3),
    "v5e": _known("TPU v5e", 16 * GIB, 8.1e11, 2),
    "v5p": _known("TPU v5p", 95 * GIB, 2.765e12, 3),
    "v6e": _known("TPU v6e", 32 * GIB, 1.64e12, 2),
    "tpu7x": Chip("TPU7x", 96 * GIB, 1.153e15, 3.69e12, 3e11, 3),
}
# NVIDIA's data sheets, SXM.
GPUS = {
    "a100": _known("A100", 80e9, 2.0e12),
    "h100": _known("H100", 80e9, 3.35e12),
    "h200": _known("H200", 141e9, 4.8e12),
    "b200": _known("B200", 180e9, 7.7e12),
}


@dataclass(frozen=True)
class Target:
    """Devices to compile for."""

    topology: str  # as it was typed
    chip: Chip
    devices: list[jax.Device]
    # Of GPUs, whose compiler needs one: XLA:CPU's programs stand for theirs.
    estimated: bool = False


def find_target(topology: str) -> Target:
    """What --topology names. Raises UserError for what it does not know."""
    kind, _, shape = topology.partition(":")
    gpus = re.fullmatch(rf"({'|'.join(GPUS)})x([1-9]\d*)", shape)
    if kind in TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        return Target(topology, TPUS[kind], tpu_devices(topology))
    if kind == "gpu" and gpus:
        return Target(topology, GPUS[gpus[1]], _simulated(int(gpus[2]), topology), estimated=True)
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        devices = _simulated(int(shape), topology)
        return Target(topology, _cpu(len(devices)), devices)
    raise UserError(
        f"--topology {topology} is unknown: write the chips of a TPU as v5p:4x4x4 "
        f"({one_of_these(list(TPUS))}), GPUs as gpu:h100x64 ({one_of_these(list(GPUS))}), or "
        f"simulated devices of this machine as cpu:8."
    )


def _simulated(count: int, topology: str) -> list[jax.Device]:
    if count > 4096:
        raise UserError(f"--topology {topology} has more than 4,096 simulated devices: take fewer.")
    use_devices(DevicesConfig(simulate=count))
    return jax.devices("cpu")[:count]


def _cpu(devices: int) -> Chip:
    """An equal part of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip("CPU", memory / devices, 3e10, 2e10 / devices, 4e9, 0)
