"""Products with a matrix of parameters, in either of its two forms.

Training holds a plain array with the inputs first, [D, H, Q]: FSDP gathers run along the leading
dim. Inference holds a `PackedWeight`, outputs first and inputs last, [H, Q, D], which is also how
checkpoints of other frameworks store it: a product with one token then reads rows one after
another, at the speed of memory (docs/benchmarks.md). A `PackedWeight` may be quantised; it is
dequantised inside the product.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.products import dot
from moe_jax.ops.quantized import PackedWeight, dequantize, halves, whole_halves
from moe_jax.parallel.half_bits import as_floats
from moe_jax.runtime.platform import default_platform


def project(
    x: jax.Array, w: jax.Array | PackedWeight, *, precision: lax.Precision | None = None
) -> jax.Array:
    """x [..., D] times [D, *outputs]: [..., *outputs], in x's dtype; f32 products as exact as
    `precision` says.
    """
    if isinstance(w, PackedWeight):
        return apply(x, w, precision=precision)
    return dot(x, w, ((x.ndim - 1,), (0,)), x.dtype, precision=precision)


def join(x: jax.Array, w: jax.Array | PackedWeight, inputs: int = 1) -> jax.Array:
    """x [..., *inputs] times [D, *inputs], summed over its `inputs` trailing dims: [..., D], in x's
    dtype.
    """
    flat = x.reshape(*x.shape[: x.ndim - inputs], -1)
    return apply(
        flat, w if isinstance(w, PackedWeight) else PackedWeight(w.reshape(w.shape[0], -1))
    )


def apply(
    x: jax.Array, matrix: PackedWeight, *, precision: lax.Precision | None = None
) -> jax.Array:
    """x [..., I] times a `PackedWeight` [*outputs, I]: [..., *outputs], in x's dtype."""
    outputs, platform = matrix.values.shape[:-1], default_platform()
    rows = math.prod(outputs)
    if matrix.kind == "int8":  # a scale an output: it can wait until after the product
        steps = matrix.values.reshape(rows, -1).astype(x.dtype)
        product = _contract(x, steps, jnp.float32, precision) * matrix.scale.reshape(-1)
    elif matrix.kind == "int4" and not platform.cuts_rows:
        product = _int4_rows(x, matrix, precision)
    elif matrix.kind == "int4" and math.prod(x.shape[:-1]) == 1 and platform.fuses_sums:
        product = _int4_row(x, matrix)
    else:
        product = _contract(x, dequantize(matrix, x.dtype).reshape(rows, -1), x.dtype, precision)
    return product.astype(x.dtype).reshape(*x.shape[:-1], *outputs)


def _int4_row(x: jax.Array, matrix: PackedWeight) -> jax.Array:
    """One row times an int4 matrix, in f32. As one reduction, not a dot: XLA:CPU then unpacks in
    registers, eight times as fast.
    """
    (low, high), groups = halves(matrix, jnp.float32), matrix.scale.shape[-1]
    first, second = jnp.split(x.reshape(groups, -1).astype(jnp.float32), 2, axis=-1)
    parts = (low * first + high * second) * as_floats(matrix.scale).astype(jnp.float32)[..., None]
    return jnp.sum(parts, axis=(-1, -2))


def _int4_rows(x: jax.Array, matrix: PackedWeight, precision: lax.Precision | None) -> jax.Array:
    """x [..., I] times an int4 matrix, in f32, without cutting the matrix's inputs into groups."""
    x_by_half = x.reshape(*x.shape[:-1], matrix.scale.shape[-1], 2, -1)
    parts = [
        _contract(
            x_by_half[..., half, :].reshape(*x.shape[:-1], -1),
            weights.reshape(-1, weights.shape[-1]),
            jnp.float32,
            precision,
        )
        for half, weights in enumerate(whole_halves(matrix, x.dtype))
    ]
    return parts[0] + parts[1]


def _contract(x: jax.Array, w: jax.Array, dtype: Any, precision: lax.Precision | None) -> jax.Array:
    """x [..., I] times w [O, I]: [..., O] in `dtype`. One row alone is a matrix-vector product,
    which XLA:CPU runs at memory speed.
    """
    if math.prod(x.shape[:-1]) == 1:
        product = dot(w, x.reshape(-1), ((1,), (0,)), dtype, precision=precision)
        return product.reshape(*x.shape[:-1], -1)
    return dot(x, w, ((x.ndim - 1,), (1,)), dtype, precision=precision)
