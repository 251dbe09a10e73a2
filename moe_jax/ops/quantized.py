"""Weights as inference holds them: outputs first, whole or in 8 or 4 bits with scales."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from moe_jax.parallel.half_bits import as_floats

Kind = Literal["float", "int8", "int4"]


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("kind",))
@dataclass(frozen=True)
class PackedWeight:
    """Weights for inference, [..., outputs, inputs]: all inputs in the last dim; leading dims stack
    matrices.

    Kinds: `float` values are the weights; `int8` values times a scale an output, [..., outputs];
    `int4` two values per byte, [..., outputs, inputs / 2], each less 8, times a scale per group of
    inputs, [..., outputs, inputs / group]. The first half of a group is in the low halves of its
    bytes and the second half in the high ones. A program on the CPU has the bits of what is bf16
    (parallel/half_bits.py).
    """

    values: Any
    scale: Any = None
    kind: Kind = "float"


def quantize(weights: jax.Array, kind: Kind, group: int = 64) -> PackedWeight:
    """A `PackedWeight` from float weights [..., outputs, inputs].

    int8 rounds to 127 steps of each output's largest weight (scale f32), int4 to 7 steps of each
    group's (scale bf16). The error of a weight is about half a step at most. Raises ValueError
    where `group` does not divide the inputs.
    """
    if kind == "float":
        return PackedWeight(weights)
    weights = weights.astype(jnp.float32)
    if kind == "int8":
        scale = jnp.max(jnp.abs(weights), axis=-1) / 127
        return PackedWeight(
            jnp.round(weights / _safe(scale)[..., None]).astype(jnp.int8), scale, "int8"
        )
    width = weights.shape[-1]
    if width % group or group % 2:
        raise ValueError(f"groups of {group} do not divide the last dim of {weights.shape}")
    grouped = weights.reshape(*weights.shape[:-1], width // group, group)
    scale = (jnp.max(jnp.abs(grouped), axis=-1) / 7).astype(jnp.bfloat16)
    steps = jnp.clip(jnp.round(grouped / _safe(scale.astype(jnp.float32))[..., None]), -8, 7) + 8
    low, high = jnp.split(steps.astype(jnp.uint8), 2, axis=-1)
    return PackedWeight((low | (high << 4)).reshape(*weights.shape[:-1], width // 2), scale, "int4")


def _safe(scale: jax.Array) -> jax.Array:
    """The scale, or 1 for a row of zeros."""
    return jnp.where(scale > 0, scale, 1.0)


def dequantize(matrix: PackedWeight, dtype: Any) -> jax.Array:
    """The weights [..., outputs, inputs] in `dtype`."""
    if matrix.kind == "float":
        return as_floats(matrix.values).astype(dtype)
    if matrix.kind == "int8":
        return matrix.values.astype(dtype) * matrix.scale[..., None].astype(dtype)
    scale = as_floats(matrix.scale)[..., None].astype(dtype)
    grouped = jnp.concatenate(halves(matrix, dtype), axis=-1) * scale
    return grouped.reshape(*matrix.values.shape[:-1], -1)


def halves(matrix: PackedWeight, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Steps of the first and the second half of each group of an int4 matrix, [..., outputs,
    groups, group / 2].
    """
    low, high = _steps(matrix.values.reshape(*matrix.values.shape[:-1], matrix.scale.shape[-1], -1))
    return low.astype(dtype), high.astype(dtype)


def whole_halves(matrix: PackedWeight, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Weights of the first halves of all groups of an int4 matrix and of the second ones, each
    [..., outputs, inputs / 2]. No dim is cut, and scales are spread over their groups by a product:
    a compiler for TPU would lay all values out for anything else.
    """
    groups, half = matrix.scale.shape[-1], matrix.values.shape[-1] // matrix.scale.shape[-1]
    of_group = jnp.arange(groups)[:, None] == jnp.arange(groups * half) // half
    # Exact: of each sum one term is not zero.
    scale = as_floats(matrix.scale).astype(dtype) @ of_group.astype(dtype)
    low, high = _steps(matrix.values)
    return low.astype(dtype) * scale, high.astype(dtype) * scale


def _steps(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low and the high steps of an int4 matrix's bytes, int8."""
    return (values & 15).astype(jnp.int8) - 8, (values >> 4).astype(jnp.int8) - 8
