"""What a platform can do and is assumed to do: one record per platform, asked for wherever it
matters.

    platform_of(mesh.devices.flat[0]).donates
    default_platform().dtype

A platform that is not listed counts as `gpu` where rates are assumed; nothing else that it could do
is relied on. Rates are assumptions for decisions that must not depend on a measurement: of a
device's matmuls in FLOP/s, of its link to others of its host and of a host's link to others in
bytes/s. Kinds of devices that are listed have the rates that their makers publish.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Platform:
    """What is known of a platform."""

    name: str
    simulated: bool  # several devices share the cores of one machine
    donates: bool  # a computation may reuse the memory of what it is given
    dtype: str  # of weights, activations and cache in inference, if nobody says otherwise
    ragged_dot: bool  # lax.ragged_dot has a kernel; elsewhere it is a masked dense product
    fused_attention: bool  # cuDNN's kernel for half precision
    reads_host: bool  # devices read pinned host memory by themselves
    matmul_size: int  # rows and columns of a matmul that reaches the plateau of the rate
    calls_in_flight: int  # when a rate is measured, to hide what starting a call costs
    flops: float
    link_within: float
    link_between: float


_CPU = Platform(
    name="cpu",
    simulated=True,
    donates=True,
    dtype="float32",
    ragged_dot=False,
    fused_attention=False,
    reads_host=False,
    matmul_size=2048,
    calls_in_flight=1,
    flops=3e10,
    link_within=4e9,
    link_between=1e9,
)
_GPU = Platform(
    name="gpu",
    simulated=False,
    donates=True,
    dtype="bfloat16",
    ragged_dot=True,
    fused_attention=True,
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
    reads_host=True,
    matmul_size=8192,
    calls_in_flight=8,
    flops=1e14,
    link_within=4e11,
    link_between=1e11,
)
PLATFORMS = {"cpu": _CPU, "gpu": _GPU, "cuda": _GPU, "rocm": _GPU, "tpu": _TPU}


def _unknown(name: str) -> Platform:
    return Platform(
        name=name,
        simulated=False,
        donates=False,
        dtype="bfloat16",
        ragged_dot=False,
        fused_attention=False,
        reads_host=False,
        matmul_size=2048,
        calls_in_flight=8,
        flops=_GPU.flops,
        link_within=_GPU.link_within,
        link_between=_GPU.link_between,
    )


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
    record = PLATFORMS.get(device.platform) or _unknown(device.platform)
    if record.simulated:
        return record
    for kind, flops, within, between in _KINDS:
        if re.search(kind, device.device_kind, re.IGNORECASE):
            return dataclasses.replace(
                record, flops=flops, link_within=within, link_between=between
            )
    return record


def default_platform() -> Platform:
    """The record of JAX's default back end; rates are those of no kind."""
    name = jax.default_backend()
    return PLATFORMS.get(name) or _unknown(name)


def host_device() -> jax.Device:
    """The CPU of this process as a device, which there is beside every accelerator."""
    return jax.local_devices(backend="cpu")[0]
