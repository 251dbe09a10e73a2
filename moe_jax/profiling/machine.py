"""How fast this machine reads memory: the floor of decoding, which reads every active weight once a token."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp


def read_bandwidth(devices: int = 1, size: int = 2**28, repeats: int = 5) -> float:
    """Bytes a second that a sum over an array of `size` bytes reads on `devices` devices; the median of `repeats`.

    The array is larger than a CPU's caches. One device of the default back end is measured. Simulated CPU devices share
    the memory that one of them can use, so theirs is the rate of the machine; other devices multiply it.
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
    return values.nbytes / statistics.median(times) * (1 if jax.default_backend() == "cpu" else devices)
