"""What a platform can do and is assumed to do: one record per platform, asked for wherever it
matters.

    platform_of(mesh.devices.flat[0]).donates
    default_platform().dtype

A platform that is not listed counts as `gpu` where rates are assumed, and as one that reuses no
buffers. Rates are assumptions for decisions that must not depend on a measurement: of a device's
matmuls in FLOP/s, of its link to others of its host and of a host's link to others in bytes/s.
"""

from __future__ import annotations

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
        reads_host=True,
        matmul_size=2048,
        calls_in_flight=8,
        flops=_GPU.flops,
        link_within=_GPU.link_within,
        link_between=_GPU.link_between,
    )


def platform_of(device: jax.Device) -> Platform:
    """The record of a device's platform."""
    return PLATFORMS.get(device.platform) or _unknown(device.platform)


def default_platform() -> Platform:
    """The record of JAX's default back end."""
    name = jax.default_backend()
    return PLATFORMS.get(name) or _unknown(name)
