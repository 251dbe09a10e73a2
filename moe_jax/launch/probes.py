"""Tiny trials of everything a run may need of its back end, for `moe-jax doctor`.

Each probe returns a short text when it works and raises `WrongArithmetic` when its numbers differ
from numpy's. Any other error is the back end's own, and doctor shows it as the reason.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIMULATED_DEVICES = 8
LOW_PRECISION = 0.03  # of the largest value: GPUs and TPUs multiply f32 with fewer bits by default


class WrongArithmetic(Exception):
    """A back end ran and returned wrong numbers."""


def probe_against_numpy() -> str:
    """The computation that jaxlib 0.10.2 gets wrong in its last row: a vmapped mat-vec, squared and
    summed, under jit.
    """
    import jax
    import jax.numpy as jnp

    from moe_jax.runtime.platform import host_device

    rows = 32_769
    x_N3 = np.zeros((rows, 3), np.float32)
    x_N3[:, 0] = np.arange(rows)
    squares = jax.jit(jax.vmap(lambda row, matrix: jnp.sum((matrix @ row) ** 2), in_axes=(0, None)))
    with jax.default_device(host_device()):
        got = np.asarray(squares(x_N3, np.eye(3, dtype=np.float32)))
    require_equal(got, (x_N3**2).sum(axis=1), 1e-6)
    return f"a mat-vec and sum of {rows:,} rows equals numpy's"


def probe_bfloat16() -> str:
    """A bf16 matmul that accumulates in f32."""
    import jax.numpy as jnp

    a, b = random_normal(64, 256), random_normal(256, 64)
    got = jnp.matmul(
        jnp.asarray(a, jnp.bfloat16),
        jnp.asarray(b, jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    require_equal(np.asarray(got), a @ b, LOW_PRECISION)
    return f"accumulates in {got.dtype.name}"


def probe_grouped_matmul(impl: Any) -> str:
    """Rows of three groups, one of them empty, through `ops.grouped_matmul`."""
    import jax
    import jax.numpy as jnp

    from moe_jax.ops.grouped_matmul.api import grouped_matmul as operation

    sizes_G = np.array([5, 0, 11], np.int32)
    x_ND, w_GDF = random_normal(16, 8), random_normal(3, 8, 4)
    got = jax.jit(lambda x, w, sizes: operation(x, w, sizes, impl=impl))(
        jnp.asarray(x_ND), jnp.asarray(w_GDF), jnp.asarray(sizes_G)
    )
    group_N = np.repeat(np.arange(3), sizes_G)
    require_equal(np.asarray(got), np.einsum("nd,ndf->nf", x_ND, w_GDF[group_N]), LOW_PRECISION)
    return "equals numpy"


def probe_attention(impl: Any, dtype: str) -> str:
    """Causal attention of two heads over two documents, through `ops.attention`."""
    import jax
    import jax.numpy as jnp

    from moe_jax.ops.attention.api import attention as operation

    length, width = 128, 64
    q_BSHQ, k_BSGQ, v_BSGQ = random_normal(3, 1, length, 2, width)
    segments_BS = (np.arange(length)[None] >= 50).astype(np.int32)
    arguments = [jnp.asarray(x, dtype) for x in (q_BSHQ, k_BSGQ, v_BSGQ)]
    got = jax.jit(lambda q, k, v, segments: operation(q, k, v, segments, impl=impl))(
        *arguments, jnp.asarray(segments_BS)
    )
    seen_SS = np.tril(segments_BS[0][:, None] == segments_BS[0][None])
    scores_BHSS = np.where(
        seen_SS, np.einsum("bqhd,bkhd->bhqk", q_BSHQ, k_BSGQ) * width**-0.5, -np.inf
    )
    weights_BHSS = np.exp(scores_BHSS - scores_BHSS.max(axis=-1, keepdims=True))
    expected = np.einsum(
        "bhqk,bkhd->bqhd", weights_BHSS / weights_BHSS.sum(axis=-1, keepdims=True), v_BSGQ
    )
    require_equal(np.asarray(got, np.float32), expected, LOW_PRECISION)
    return f"equals numpy in {dtype}"


def probe_all_to_all() -> str:
    """The collective that sends tokens to their experts, over the simulated devices."""
    import jax
    import jax.numpy as jnp

    x_RR = np.arange(SIMULATED_DEVICES**2, dtype=np.int32).reshape(
        SIMULATED_DEVICES, SIMULATED_DEVICES
    )
    exchange = _over_devices(
        lambda x: jax.lax.all_to_all(x, "x", split_axis=1, concat_axis=1, tiled=True)
    )
    require_equal(np.asarray(exchange(jnp.asarray(x_RR))), x_RR.T, 0)
    return f"over {SIMULATED_DEVICES} simulated devices"


def probe_ragged_all_to_all() -> str:
    """The exchange of parts of unequal size, which not every platform has. Every device sends one
    element to each of the others.
    """
    import jax
    import jax.numpy as jnp

    ranks = len(_probe_devices())

    def exchange_row(x_1R: Any) -> Any:
        ones_R = jnp.ones(ranks, jnp.int32)
        place_R = jnp.full(ranks, jax.lax.axis_index("x"), jnp.int32)
        received = jax.lax.ragged_all_to_all(
            x_1R[0],
            jnp.zeros_like(x_1R[0]),
            jnp.arange(ranks),
            ones_R,
            place_R,
            ones_R,
            axis_name="x",
        )
        return received[None]

    x_RR = np.arange(ranks**2, dtype=np.int32).reshape(ranks, ranks)
    require_equal(
        np.asarray(_over_devices(exchange_row, _probe_devices())(jnp.asarray(x_RR))), x_RR.T, 0
    )
    return f"over {ranks} device{'s' if ranks > 1 else ''}"


def probe_matmul_rate() -> str:
    """Speed of an f32 matmul on the default device."""
    import jax
    import jax.numpy as jnp

    size = 2048
    a, b = jnp.asarray(random_normal(size, size)), jnp.asarray(random_normal(size, size))
    matmul = jax.jit(jnp.matmul)
    seconds = _fastest(lambda: jax.block_until_ready(matmul(a, b)))
    return f"{2 * size**3 / seconds / 1e9:,.0f} GFLOP/s at {size} x {size} x {size}"


def probe_memory_bandwidth() -> str:
    """Speed of reading memory on the default device: the sum of an array larger than any cache."""
    import jax
    import jax.numpy as jnp

    values = jnp.ones((2**27,), jnp.float32)
    add_up = jax.jit(jnp.sum)
    seconds = _fastest(lambda: jax.block_until_ready(add_up(values)))
    return f"{values.nbytes / seconds / 1e9:,.1f} GB/s reading {values.nbytes / 2**20:,.0f} MiB"


PROBES: list[tuple[str, Callable[[], str]]] = [
    ("bf16 matmul", probe_bfloat16),
    ("grouped_matmul reference", functools.partial(probe_grouped_matmul, "reference")),
    ("grouped_matmul ragged", functools.partial(probe_grouped_matmul, "ragged")),
    ("grouped_matmul tiled", functools.partial(probe_grouped_matmul, "tiled")),
    ("attention reference", functools.partial(probe_attention, "reference", "float32")),
    ("attention blockwise", functools.partial(probe_attention, "blockwise", "float32")),
    ("attention cudnn", functools.partial(probe_attention, "cudnn", "bfloat16")),
    ("all_to_all", probe_all_to_all),
    ("ragged_all_to_all", probe_ragged_all_to_all),
    ("f32 matmul rate", probe_matmul_rate),
    ("memory read rate", probe_memory_bandwidth),
]


def random_normal(*shape: int) -> np.ndarray:
    """The same values each time, f32."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def require_equal(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Raises WrongArithmetic where a value differs by more than `tolerance` times the largest
    expected one.
    """
    difference = float(np.max(np.abs(got.astype(np.float64) - expected)))
    if not difference <= tolerance * float(np.max(np.abs(expected))):
        index = tuple(
            int(i) for i in np.unravel_index(np.argmax(np.abs(got - expected)), got.shape)
        )
        raise WrongArithmetic(
            f"element {index} is {float(got[index]):.9g} instead of {float(expected[index]):.9g}"
        )


def _probe_devices() -> list[Any]:
    """The default platform's devices, up to eight; on CPU the simulated ones."""
    import jax

    return jax.devices()[:SIMULATED_DEVICES]


def _over_devices(
    body: Callable[[Any], Any], devices: list[Any] | None = None
) -> Callable[[Any], Any]:
    """`body` over one mesh axis `x`, rows of its argument and result sharded."""
    import jax
    from jax.sharding import PartitionSpec

    devices = devices or jax.devices("cpu")
    mesh = jax.sharding.Mesh(np.array(devices), ("x",))
    return jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    )


def _fastest(run: Callable[[], Any], seconds: float = 0.7) -> float:
    """Seconds of the fastest of several runs, after one that compiles."""
    run()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
