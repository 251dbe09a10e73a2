"""Products with a matrix of parameters, in either of its two forms.

Training holds a plain array with the inputs first, [D, H, Q]: FSDP gathers run along the leading dim. Inference holds a
`Matrix`, outputs first and inputs last, [H, Q, D], which is also how checkpoints of other frameworks store it: a
product with one token then reads rows one after another, at the speed of memory (docs/benchmarks.md). A `Matrix` may
be quantised; it is dequantised inside the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Kind = Literal["float", "int8", "int4"]


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("kind",))
@dataclass(frozen=True)
class Matrix:
    """Weights for inference, [..., outputs, inputs]: all inputs in the last dim; leading dims stack matrices.

    Kinds: `float` values are the weights; `int8` values times a scale an output, [..., outputs]; `int4` two values a byte,
    [..., outputs, inputs / 2], each less 8, times a scale a group of inputs, [..., outputs, inputs / group]. The first half of
    a group is in the low halves of its bytes and the second half in the high ones.
    """

    values: Any
    scale: Any = None
    kind: Kind = "float"


def quantize(weights: jax.Array, kind: Kind, group: int = 64) -> Matrix:
    """A `Matrix` from float weights [..., outputs, inputs].

    int8 rounds to 127 steps of each output's largest weight (scale f32), int4 to 7 steps of each group's (scale bf16). The
    error of a weight is about half a step at most. Raises ValueError where `group` does not divide the inputs.
    """
    if kind == "float":
        return Matrix(weights)
    weights = weights.astype(jnp.float32)
    if kind == "int8":
        scale = jnp.max(jnp.abs(weights), axis=-1) / 127
        return Matrix(jnp.round(weights / _safe(scale)[..., None]).astype(jnp.int8), scale, "int8")
    width = weights.shape[-1]
    if width % group or group % 2:
        raise ValueError(f"groups of {group} do not divide the last dim of {weights.shape}")
    grouped = weights.reshape(*weights.shape[:-1], width // group, group)
    scale = (jnp.max(jnp.abs(grouped), axis=-1) / 7).astype(jnp.bfloat16)
    steps = jnp.clip(jnp.round(grouped / _safe(scale.astype(jnp.float32))[..., None]), -8, 7) + 8
    low, high = jnp.split(steps.astype(jnp.uint8), 2, axis=-1)
    return Matrix((low | (high << 4)).reshape(*weights.shape[:-1], width // 2), scale, "int4")


def _safe(scale: jax.Array) -> jax.Array:
    """The scale, or 1 for a row of zeros."""
    return jnp.where(scale > 0, scale, 1.0)


def dequantize(matrix: Matrix, dtype: Any) -> jax.Array:
    """The weights [..., outputs, inputs] in `dtype`."""
    if matrix.kind == "float":
        return matrix.values.astype(dtype)
    if matrix.kind == "int8":
        return matrix.values.astype(dtype) * matrix.scale[..., None].astype(dtype)
    grouped = jnp.concatenate(_halves(matrix, dtype), axis=-1) * matrix.scale[..., None].astype(dtype)
    return grouped.reshape(*matrix.values.shape[:-1], -1)


def _halves(matrix: Matrix, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Steps of the first and the second half of each group of an int4 matrix, [..., outputs, groups, group / 2]."""
    bytes_ = matrix.values.reshape(*matrix.values.shape[:-1], matrix.scale.shape[-1], -1)
    low, high = (bytes_ & 15).astype(jnp.int8) - 8, (bytes_ >> 4).astype(jnp.int8) - 8
    return low.astype(dtype), high.astype(dtype)


def project(x: jax.Array, w: jax.Array | Matrix, *, precision: lax.Precision | None = None) -> jax.Array:
    """x [..., D] times [D, *outputs]: [..., *outputs], in x's dtype; f32 products as exact as `precision` says."""
    if isinstance(w, Matrix):
        return apply(x, w, precision=precision)
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)


def join(x: jax.Array, w: jax.Array | Matrix, inputs: int = 1) -> jax.Array:
    """x [..., *inputs] times [D, *inputs], summed over its `inputs` trailing dims: [..., D], in x's dtype."""
    flat = x.reshape(*x.shape[: x.ndim - inputs], -1)
    return apply(flat, w if isinstance(w, Matrix) else Matrix(w.reshape(w.shape[0], -1)))


def apply(x: jax.Array, matrix: Matrix, *, precision: lax.Precision | None = None) -> jax.Array:
    """x [..., I] times a `Matrix` [*outputs, I]: [..., *outputs], in x's dtype."""
    outputs = matrix.values.shape[:-1]
    rows = math.prod(outputs)
    if matrix.kind == "int8":  # a scale an output: it can wait until after the product
        product = _contract(x, matrix.values.reshape(rows, -1).astype(x.dtype), precision) * matrix.scale.reshape(-1)
    elif matrix.kind == "int4" and math.prod(x.shape[:-1]) == 1:
        product = _int4_row(x, matrix)
    else:
        product = _contract(x, dequantize(matrix, x.dtype).reshape(rows, -1), precision)
    return product.astype(x.dtype).reshape(*x.shape[:-1], *outputs)


def _int4_row(x: jax.Array, matrix: Matrix) -> jax.Array:
    """One row times an int4 matrix, in f32. As one reduction, not a dot: XLA:CPU then unpacks in registers, eight times as fast."""
    (low, high), groups = _halves(matrix, jnp.float32), matrix.scale.shape[-1]
    first, second = jnp.split(x.reshape(groups, -1).astype(jnp.float32), 2, axis=-1)
    parts = (low * first + high * second) * matrix.scale.astype(jnp.float32)[..., None]
    return jnp.sum(parts, axis=(-1, -2))


def _contract(x: jax.Array, w: jax.Array, precision: lax.Precision | None) -> jax.Array:
    """x [..., I] times w [O, I]: f32 [..., O]. One row alone is a matrix-vector product, which XLA:CPU runs at memory speed."""
    options: dict[str, Any] = {"precision": precision, "preferred_element_type": jnp.float32}
    if math.prod(x.shape[:-1]) == 1:
        return lax.dot_general(w, x.reshape(-1), (((1,), (0,)), ((), ())), **options).reshape(*x.shape[:-1], -1)
    return lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), **options)
