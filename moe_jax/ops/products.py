"""Products of matrices that say in which type they accumulate: f32, on every platform.

A plug-in may give the result of bf16 matrices in bf16 although the program says f32
(`Platform.mixed_dots`). There the operands are f32 where the result must be; where it is rounded to
the operands' type in any case, the product is asked for in that type, and rounds once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.runtime.platform import default_platform


def einsum_f32(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The einsum of two arrays, in f32."""
    if default_platform().mixed_dots:
        return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
    return jnp.einsum(subscripts, x.astype(jnp.float32), y.astype(jnp.float32))


def dot(
    x: jax.Array,
    y: jax.Array,
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: Any = jnp.float32,
    *,
    precision: lax.Precision | None = None,
) -> jax.Array:
    """The product of two arrays of one type over the dims `contract`, added up in f32 and given in
    `dtype`; f32 products as exact as `precision` says.
    """
    result: Any = jnp.float32
    if not default_platform().mixed_dots:
        if x.dtype == dtype:
            result = x.dtype
        else:
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    dims = (contract, ((), ()))
    product = lax.dot_general(x, y, dims, precision=precision, preferred_element_type=result)
    return product.astype(dtype)
