"""Figures that speed is judged by: the matmul rate of this machine, the FLOPs and bytes that a model needs at
least, and what its compiled program spends. Needs jax, flax, optax and numpy alone.

FLOPs count a multiplication and an addition as two. docs/benchmarks.md says how the figures are used.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.models.parameters import leaves, sizes
from moe_jax.models.transformer import layer_kinds

TRAINING = 3  # FLOPs of a training step over those of its forward pass: each matmul has two gradients
MATMUL_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # rows and columns: large enough to reach the plateau


def matmul_rate(dtype: Any, devices: int = 1, size: int | None = None, seconds: float = 1.0) -> tuple[float, str]:
    """The best rate, in FLOP/s, that a square matmul of `dtype` reaches on `devices` devices, and what was measured.

    One device of the default back end is timed for about `seconds` (at least three times). Simulated CPU devices
    share the cores that one of them can use, so theirs is the rate of the machine; other devices multiply it.
    """
    platform, dtype = jax.default_backend(), jnp.dtype(dtype)
    size = size or MATMUL_SIZE.get(platform, 2048)
    queue = 1 if platform == "cpu" else 8  # calls in flight, to hide what starting one costs
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
    if platform == "cpu":
        return rate, f"{text}, all cores of the machine"
    return rate * devices, f"{text} on one {jax.devices()[0].device_kind}, times {devices}"


# What the model needs.


def mean_visible(seq_len: int, window: int | None) -> float:
    """Keys that a query of a `seq_len` document sees on average under the causal mask and a window."""
    return float(np.mean(np.minimum(np.arange(1, seq_len + 1), window or seq_len)))


def _weights(model: ModelConfig, moe: MoEConfig, vocab_size: int) -> Iterator[tuple[str, int, int]]:
    """Each leaf of the parameter tree: its name within a layer, its parameters, and those of them that one token uses."""
    size = sizes(model, moe, vocab_size)
    for leaf in leaves(model, moe).values():
        count = math.prod(size[dim] for dim in leaf.dims) * (1 if leaf.layers is None else len(leaf.layers))
        yield leaf.name, count, count // moe.num_experts * moe.top_k if "P" in leaf.dims else count


def model_flops(model: ModelConfig, moe: MoEConfig, vocab_size: int, seq_len: int) -> float:
    """FLOPs of the forward pass a token, for sequences that are one document of `seq_len` tokens; training is 3 times this.

    Two for each weight of a matmul that the token passes (router, its `top_k` experts, shared experts, attention,
    dense layers, head; looking up an embedding is free) and two matmuls with the keys it sees. Recomputation,
    padding, norms, biases and softmax do not count, and dropped choices count as if they were computed.
    """
    flops = 2.0 * vocab_size * model.width * model.tied_embeddings  # a head of its own is among the weights
    for name, _, used in _weights(model, moe, vocab_size):
        if name != "embedding" and not name.endswith(("scale", "sinks", "bias")):
            flops += 2 * used
    widths = model.num_heads * (model.query_width + model.value_width)
    return flops + sum(2 * widths * mean_visible(seq_len, kind.window) for kind in layer_kinds(model, moe))


def parameter_counts(model: ModelConfig, moe: MoEConfig, vocab_size: int) -> tuple[int, int]:
    """(parameters, those that one token uses): all but the experts not chosen. Empty slots and replicas do not count."""
    found = list(_weights(model, moe, vocab_size))
    return sum(count for _, count, _ in found), sum(used for _, _, used in found)


# What the compiled program spends.


def memory(compiled: Any) -> dict[str, int]:
    """Bytes a device of a compiled function's arguments, results and temporaries; donated arguments are in both first."""
    sizes = compiled.memory_analysis()
    return {
        "argument_bytes": sizes.argument_size_in_bytes,
        "output_bytes": sizes.output_size_in_bytes,
        "temp_bytes": sizes.temp_size_in_bytes,
    }


def peak_bytes() -> int:
    """Most memory in use so far: of the fullest accelerator, or on CPU of this whole process, compiler included."""
    statistics = [device.memory_stats() for device in jax.local_devices()]
    if jax.default_backend() != "cpu" and all(statistics):
        return max(entry["peak_bytes_in_use"] for entry in statistics)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
