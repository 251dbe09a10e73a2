"""What a platform can do and is assumed to do: one record per platform, asked for wherever it
matters.

    platform_of(mesh.devices.flat[0]).donates
    default_platform().dtype

Apple's Metal has one record for all of its plug-ins, of what the weakest of them can do. The CPU
can stand in for it (`stand_in`): programs are then those for Metal, and run anywhere.

A platform that is not listed counts as `gpu` where rates are assumed; nothing else that it could do
is relied on. Rates are assumptions for decisions that must not depend on a measurement: of a
device's matmuls in FLOP/s, of its link to others of its host and of a host's link to others in
bytes/s. Kinds of devices that are listed have the rates that their makers publish.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import jax

from moe_jax.runtime.metal import METAL_ON_CPU, PLUGINS


@dataclass(frozen=True)
class Platform:
    """What is known of a platform."""

    name: str
    simulated: bool  # several devices share the cores of one machine
    donates: bool  # a computation may reuse the memory of what it is given
    dtype: str  # of weights, activations and cache in inference, if nobody says otherwise
    ragged_dot: bool  # lax.ragged_dot has a kernel; elsewhere it is a masked dense product
    fused_attention: bool  # cuDNN's kernel for half precision
    splash_attention: bool  # JAX's kernel for TPU; elsewhere it is interpreted, slowly
    reads_host: bool  # devices read pinned host memory by themselves
    matmul_size: int  # rows and columns of a matmul that reaches the plateau of the rate
    calls_in_flight: int  # when a rate is measured, to hide what starting a call costs
    flops: float
    link_within: float
    link_between: float
    one_device: bool = False  # there is no second one, and no collective
    shares_memory: bool = False  # with its host, and copies what is put on it all the same
    # A loop may be as long as the program finds out; elsewhere each turn then waits for the host.
    open_loops: bool = True
    stacks_in_loops: bool = True  # what a loop stacks, turn by turn, comes out whole
    mixed_dots: bool = True  # a product of bf16 matrices can have f32 results
    fuses_sums: bool = True  # what is only added up is not written to memory before
    cuts_halves: bool = True  # a part of a bf16 array is cut out without converting all of it
    cuts_rows: bool = True  # cutting the last dim into short pieces does not move what is in it
    # Keys are cached with the places of a row in the last dim, which a product with one query reads
    # one after another; elsewhere a row's keys are one after another, like its values.
    places_last: bool = True
    # Rows of a tile of the product with packed weights, where that walks tiles although there is a
    # kernel for `lax.ragged_dot`: the kernel wants another layout, and would copy the weights.
    packed_tile: int | None = None
    # A gather over several mesh axes goes one axis at a time, and a scatter of sums likewise: of
    # one over all axes at once the compiler makes a sum of zero-padded parts, of twice the bytes.
    gathers_by_axis: bool = False
    overlaps: bool = False  # an exchange runs beside computation that does not depend on it
    # For programs with exchanges, by the names of XLA's flags.
    compiler_options: tuple[tuple[str, bool], ...] = ()


_CPU = Platform(
    name="cpu",
    simulated=True,
    donates=True,
    dtype="float32",
    ragged_dot=False,
    fused_attention=False,
    splash_attention=False,
    reads_host=False,
    matmul_size=2048,
    calls_in_flight=1,
    flops=3e10,
    link_within=4e9,
    link_between=1e9,
    cuts_halves=False,
)
_GPU = Platform(
    name="gpu",
    simulated=False,
    donates=True,
    dtype="bfloat16",
    ragged_dot=True,
    fused_attention=True,
    splash_attention=False,
    reads_host=True,
    matmul_size=8192,
    calls_in_flight=8,
    flops=2e14,
    link_within=4.5e11,
    link_between=2e11,
)
_TPU = Platform(
    name="tpu",
    simulated=False,
    donates=True,
    dtype="bfloat16",
    ragged_dot=True,
    fused_attention=False,
    splash_attention=True,
    reads_host=True,
    matmul_size=8192,
    calls_in_flight=8,
    flops=1e14,
    link_within=4e11,
    link_between=1e11,
    places_last=False,
    packed_tile=256,
    cuts_rows=False,
    gathers_by_axis=True,
    overlaps=True,
    compiler_options=(("xla_tpu_enable_async_all_to_all", True),),
)
# What no plug-in lacks, from the wheels and the issues of jax-mps 0.10.11 and metaljax 0.11.9.
# Rates are of an M4 Max, as Apple publishes its memory's and others measured.
_METAL = Platform(
    name="metal",
    simulated=False,
    donates=False,
    dtype="bfloat16",
    ragged_dot=False,
    fused_attention=False,
    splash_attention=False,
    reads_host=False,
    matmul_size=4096,
    calls_in_flight=8,
    flops=1.5e13,
    link_within=5e11,
    link_between=1e9,
    one_device=True,
    shares_memory=True,
    open_loops=False,
    stacks_in_loops=False,
    mixed_dots=False,
    fuses_sums=False,
)
_METAL_ON_CPU = dataclasses.replace(
    _METAL,
    simulated=True,
    dtype=_CPU.dtype,
    matmul_size=_CPU.matmul_size,
    calls_in_flight=_CPU.calls_in_flight,
    flops=_CPU.flops,
    link_within=_CPU.link_within,
)
PLATFORMS = {
    "cpu": _CPU,
    "gpu": _GPU,
    "cuda": _GPU,
    "rocm": _GPU,
    "tpu": _TPU,
    **dict.fromkeys(PLUGINS, _METAL),
}

_stand_in: Platform | None = None


def stand_in(name: str | None) -> None:
    """From now on CPU devices have the record of this platform, `metal-on-cpu`, or again their own.

    What is compiled already stays as it is.
    """
    global _stand_in
    _stand_in = {None: None, METAL_ON_CPU: _METAL_ON_CPU}[name]


def stands_in() -> bool:
    """Whether CPU devices have another platform's record."""
    return _stand_in is not None


@contextmanager
def standing_in(name: str | None) -> Iterator[None]:
    """`stand_in` for a while."""
    global _stand_in
    before = _stand_in
    stand_in(name)
    try:
        yield
    finally:
        _stand_in = before


def _unknown(name: str) -> Platform:
    return Platform(
        name=name,
        simulated=False,
        donates=False,
        dtype="bfloat16",
        ragged_dot=False,
        fused_attention=False,
        splash_attention=False,
        reads_host=False,
        matmul_size=2048,
        calls_in_flight=8,
        flops=_GPU.flops,
        link_within=_GPU.link_within,
        link_between=_GPU.link_between,
    )


class Rates(NamedTuple):
    """Those of a `Platform`."""

    flops: float
    link_within: float
    link_between: float


# Rates by device kind, as published: dense matmuls in bf16 (T4: f16), then a device's link to its
# host's others and a host's link to other hosts, one way. NVIDIA: data sheets and the systems of
# ai-dynamo/aiconfigurator, 8 GPUs per host with a port of 400 Gb/s each (A100: 200 Gb/s); T4 and L4
# over PCIe, with 100 Gb/s per host. TPU: docs.cloud.google.com/tpu/docs; hosts of a slice are
# joined by the links of their chips (v5e 8 chips per host, the others 4).
_KINDS = (
    (r"\bB200\b", 2.25e15, 9e11, 4e11),
    (r"\bH200\b", 9.89e14, 4.5e11, 4e11),
    (r"\bH100\b.*PCIe", 7.56e14, 6.4e10, 4e11),
    (r"\bH100\b", 9.89e14, 4.5e11, 4e11),
    (r"\bA100\b.*PCIe", 3.12e14, 3.2e10, 2e11),
    (r"\bA100\b", 3.12e14, 3e11, 2e11),
    (r"\bL4\b", 1.21e14, 3.2e10, 1.25e10),
    (r"\bT4\b", 6.5e13, 1.6e10, 1.25e10),
    (r"^TPU v4$", 2.75e14, 3e11, 1.2e12),
    (r"^TPU v5( lite|e)$", 1.97e14, 2e11, 1.6e12),
    (r"^TPU v5p?$", 4.59e14, 6e11, 2.4e12),
    (r"^TPU v6( lite|e)$", 9.18e14, 4e11, 1.6e12),
)


def platform_of(device: jax.Device) -> Platform:
    """The record of a device's platform, with the rates of its kind if that is listed."""
    record = _record(device.platform)
    if record.simulated:
        return record
    rates = published_rates(device.device_kind)
    return record if rates is None else dataclasses.replace(record, **rates._asdict())


def published_rates(device_kind: str) -> Rates | None:
    """Of the devices that JAX gives this kind; None where it is not listed."""
    for kind, *rates in _KINDS:
        if re.search(kind, device_kind, re.IGNORECASE):
            return Rates(*rates)
    return None


def default_platform() -> Platform:
    """The record of JAX's default back end, or of the devices that programs are being compiled for;
    rates are those of no kind.
    """
    return _record(_compiled_for or jax.default_backend())


def _record(name: str) -> Platform:
    if name == "cpu" and _stand_in is not None:
        return _stand_in
    return PLATFORMS.get(name) or _unknown(name)


_compiled_for: str | None = None


@contextmanager
def compiling_for(device: jax.Device) -> Iterator[None]:
    """While programs are traced for devices that are not JAX's own, their platform is the
    default.
    """
    global _compiled_for
    before, _compiled_for = _compiled_for, device.platform
    try:
        yield
    finally:
        _compiled_for = before


def host_device() -> jax.Device:
    """The CPU of this process as a device, which there is beside every accelerator."""
    return jax.local_devices(backend="cpu")[0]
