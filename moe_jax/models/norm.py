"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.parallel.collectives import psum
from moe_jax.parallel.sharding import axes_of, param


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation of the last dims (Zhang and Sennrich, 2019), in f32.

    The scale has the dims that are normalised together; `axes` name them where the first may be
    sharded.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        eps: float,
        *,
        axes: tuple[str, ...] = ("norm",),
        rngs: nnx.Rngs,
    ):
        self.eps = eps
        self.scale = param(rngs, shape, axes, None)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, x32 = self.scale.get_value(), x.astype(jnp.float32)
        dims = tuple(range(-scale.ndim, 0))
        mean = jnp.mean(x32 * x32, axis=dims, keepdims=True)
        if scale.ndim > 1:
            sharded = axes_of(self.scale, self.scale.get_metadata("axes")[0])
            mean = psum(mean, sharded) / (lax.axis_size(sharded) if sharded else 1)
        return (x32 * lax.rsqrt(mean + self.eps) * scale).astype(x.dtype)
