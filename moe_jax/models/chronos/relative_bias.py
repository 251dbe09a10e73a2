"""T5's bias on attention scores by relative position (Raffel et al., 2020)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.parallel.sharding import param
from moe_jax.utils.annotations import Array, Float


class RelativeBias(nnx.Module):
    """One table for all layers of a stack, [buckets, H]."""

    def __init__(
        self,
        buckets: int,
        max_distance: int,
        num_heads: int,
        std: float,
        *,
        causal: bool,
        rngs: nnx.Rngs,
    ):
        self.max_distance, self.causal = max_distance, causal
        self.table = param(rngs, (buckets, num_heads), ("buckets", "heads"), std)

    def __call__(self, queries: int, keys: int) -> Float[Array, "H S M"]:
        """The biases of queries at the positions from 0 and keys at the positions from 0."""
        relative_SM = np.arange(keys)[None, :] - np.arange(queries)[:, None]
        table = self.table.get_value()
        bucket_SM = bucket_of(relative_SM, table.shape[0], self.max_distance, self.causal)
        return jnp.moveaxis(table[bucket_SM], -1, 0)


def bucket_of(relative: np.ndarray, buckets: int, max_distance: int, causal: bool) -> np.ndarray:
    """The bucket of each relative position, key minus query: near ones have their own, farther ones
    share one by the logarithm of their distance.

    Causal, all keys ahead are in bucket 0; else half of the buckets is for keys ahead. In f32, as
    in T5: its rounding decides at powers of two.
    """
    if causal:
        first, distance = np.zeros_like(relative), np.maximum(-relative, 0)
    else:
        buckets //= 2
        first, distance = np.where(relative > 0, buckets, 0), np.abs(relative)
    exact = buckets // 2
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + steps.astype(np.int64), buckets - 1)
    return first + np.where(distance < exact, distance, far)
