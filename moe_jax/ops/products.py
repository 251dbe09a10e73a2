"""Products of matrices that say in which type they accumulate: f32, on every platform.

A plug-in may give the result of bf16 matrices in bf16 although the program says f32
(`Platform.mixed_dots`). There the operands are f32 where the result must be; where it is rounded to
the operands' type in any case, the product is asked for in that type, and rounds once.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.parallel.collectives import vary, vary_alike, vma
from moe_jax.parallel.half_bits import as_floats
from moe_jax.runtime.platform import default_platform

ROWS_AT_ONCE = 16  # of a matrix of bits that one row of numbers is multiplied by
COLUMNS_AT_ONCE = 512  # for several rows: as f32 they stay in the cache


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


def dot_bits(x_TD: jax.Array, bits_DV: jax.Array) -> jax.Array:
    """The product in f32 [T, V] with a matrix that is held as bits (parallel/half_bits.py), inputs
    first; never are more than a few of its rows or columns there as f32.
    """
    x_TD, bits_DV = vary_alike(x_TD.astype(jnp.float32), bits_DV)
    inputs, outputs = bits_DV.shape
    if x_TD.shape[0] == 1:
        size = math.gcd(inputs, ROWS_AT_ONCE)

        def add_rows(i: jax.Array, y_V: jax.Array) -> jax.Array:
            rows = as_floats(lax.dynamic_slice_in_dim(bits_DV, i * size, size))
            x_D1 = lax.dynamic_slice_in_dim(x_TD[0, :, None], i * size, size)
            return y_V + jnp.sum(rows.astype(jnp.float32) * x_D1, axis=0)

        y_V = vary(jnp.zeros(outputs, jnp.float32), vma(bits_DV))
        return lax.fori_loop(0, inputs // size, add_rows, y_V)[None]
    size = min(outputs, COLUMNS_AT_ONCE)

    def put_columns(i: jax.Array, y_TV: jax.Array) -> jax.Array:
        start = jnp.minimum(i * size, outputs - size)
        columns = as_floats(lax.dynamic_slice_in_dim(bits_DV, start, size, axis=1))
        product = dot(x_TD, columns.astype(jnp.float32), ((1,), (0,)))
        return lax.dynamic_update_slice_in_dim(y_TV, product, start, 1)

    y_TV = vary(jnp.zeros((x_TD.shape[0], outputs), jnp.float32), vma(bits_DV))
    return lax.fori_loop(0, -(-outputs // size), put_columns, y_TV)
