"""How fast this machine reads memory: the floor of decoding, which reads every active weight once a
token.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.runtime.platform import default_platform


def read_bandwidth(devices: int = 1, size: int = 2**28, repeats: int = 5) -> float:
    """Bytes per second that a sum over an array of `size` bytes reads on `devices` devices; the
    median of `repeats`.

    The array is larger than a CPU's caches. One device of the default back end is measured.
    Simulated CPU devices share the memory that one of them can use, so theirs is the rate of the
    machine; other devices multiply it.
    """
    values = jnp.ones((size // 4,), jnp.float32)
    # Sums of rows and matrix-vector products read as fast, within a tenth.
    add_up = jax.jit(jnp.sum)
    add_up(values).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        add_up(values).block_until_ready()
        times.append(time.perf_counter() - start)
    return (
        values.nbytes / statistics.median(times) * (1 if default_platform().simulated else devices)
    )


def matmul_rate(
    dtype: Any, devices: int = 1, size: int | None = None, seconds: float = 1.0
) -> tuple[float, str]:
    """The best rate, in FLOP/s, that a square matmul of `dtype` reaches on `devices` devices, and
    what was measured.

    One device of the default back end is timed for about `seconds` (at least three times).
    Simulated CPU devices share the cores that one of them can use, so theirs is the rate of the
    machine; other devices multiply it.
    """
    platform, dtype = default_platform(), jnp.dtype(dtype)
    size, queue = size or platform.matmul_size, platform.calls_in_flight
    key_a, key_b = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in (key_a, key_b))
    matmul = jax.jit(jnp.matmul)
    matmul(a, b).block_until_ready()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        jax.block_until_ready([matmul(a, b) for _ in range(queue)])
        times.append(time.perf_counter() - start)
    rate = 2 * size**3 * queue / min(times)
    text = f"{dtype.name} {size} x {size} x {size}, best of {len(times)}"
    if platform.simulated:
        return rate, f"{text}, all cores of the machine"
    return rate * devices, f"{text} on one {jax.devices()[0].device_kind}, times {devices}"


def peak_bytes() -> int:
    """Most memory in use so far: of the fullest accelerator, or on CPU of this whole process,
    compiler included.
    """
    statistics = [device.memory_stats() for device in jax.local_devices()]
    if not default_platform().simulated and all(statistics):
        return max(entry["peak_bytes_in_use"] for entry in statistics)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
