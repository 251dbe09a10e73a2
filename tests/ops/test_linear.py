"""Matrices for inference, in their three forms, against the same arithmetic in numpy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.ops.linear import apply, join, project
from moe_jax.ops.quantized import PackedWeight, dequantize, quantize
from moe_jax.runtime import platform

OUTPUTS, INPUTS, GROUP = (3, 5), 24, 8


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    """Outputs [2 stacked, 3, 5] of very different sizes; one of zeros, and in another one group of
    zeros.
    """
    rng = np.random.default_rng(0)
    found = rng.standard_normal((2, *OUTPUTS, INPUTS)) * np.exp(
        rng.uniform(-6, 6, (2, *OUTPUTS, 1))
    )
    found[0, 1, 2], found[1, 2, 4, GROUP : 2 * GROUP] = 0, 0
    return found.astype(np.float32)


def by_hand(matrix: PackedWeight) -> np.ndarray:
    """The weights that the documented layout stands for, f32."""
    values, scale = np.asarray(matrix.values), np.asarray(matrix.scale, np.float32)
    if matrix.kind == "int8":
        return values * scale[..., None]
    grouped = values.reshape(*scale.shape, -1)
    steps = np.concatenate([grouped % 16, grouped // 16], axis=-1).astype(np.float32) - 8
    return (steps * scale[..., None]).reshape(*values.shape[:-1], -1)


def test_int8_is_half_a_step_of_each_output_off_at_most(weights):
    matrix = jax.jit(quantize, static_argnums=1)(weights, "int8")
    top = np.abs(weights).max(axis=-1)
    assert (matrix.values.dtype, matrix.scale.dtype) == (jnp.int8, jnp.float32)
    assert matrix.values.shape == weights.shape and matrix.scale.shape == weights.shape[:-1]
    np.testing.assert_allclose(matrix.scale, top / 127, rtol=1e-6)
    error = np.abs(np.asarray(dequantize(matrix, jnp.float32)) - weights)
    assert np.all(error <= top[..., None] / 127 / 2 * (1 + 1e-4))
    assert (
        np.abs(np.asarray(matrix.values)).max(axis=-1)[top > 0].min() == 127
    )  # each output uses its range


def test_int4_is_half_a_step_of_each_group_off_at_most(weights):
    matrix = jax.jit(quantize, static_argnums=(1, 2))(weights, "int4", GROUP)
    grouped = weights.reshape(*weights.shape[:-1], -1, GROUP)
    top = np.abs(grouped).max(axis=-1)
    assert (matrix.values.dtype, matrix.scale.dtype) == (jnp.uint8, jnp.bfloat16)
    assert (
        matrix.values.shape == (*weights.shape[:-1], INPUTS // 2)
        and matrix.scale.shape == top.shape
    )
    np.testing.assert_array_equal(np.asarray(matrix.scale), (top / 7).astype(ml_dtypes.bfloat16))
    # Half a step, and for the largest weights what rounding the scale to 8 bits moves 7 steps by.
    error = np.abs(np.asarray(dequantize(matrix, jnp.float32)).reshape(grouped.shape) - grouped)
    assert np.all(error <= top[..., None] / 7 * (1 + 2**-8) / 2 + top[..., None] * 2**-8)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_layout_is_the_documented_one(weights, kind):
    matrix = quantize(jnp.asarray(weights), kind, GROUP)
    np.testing.assert_array_equal(dequantize(matrix, jnp.float32), by_hand(matrix))
    zeros = by_hand(matrix)[0, 1, 2], by_hand(matrix)[1, 2, 4, GROUP : 2 * GROUP]
    assert all(np.all(part == 0) for part in zeros)


def test_int4_by_hand():
    matrix = quantize(jnp.array([[7.0, -7.0, 3.4, 0.0, 14.0, 2.0, -1.2, -14.0]]), "int4", 4)
    np.testing.assert_array_equal(
        matrix.values, [[15 + 16 * 11, 1 + 16 * 8, 15 + 16 * 7, 9 + 16 * 1]]
    )
    np.testing.assert_array_equal(matrix.scale.astype(jnp.float32), [[1.0, 2.0]])
    np.testing.assert_array_equal(dequantize(matrix, jnp.float32), [[7, -7, 3, 0, 14, 2, -2, -14]])


@pytest.mark.parametrize("rows", [(), (1,), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["float", "int8", "int4", "int4 whole"])
def test_products(weights, kind, rows, monkeypatch):
    """One matrix of the stack times one row, whatever its leading dims, or several."""
    kind, _, whole = kind.partition(" ")  # whose inputs are not cut into groups
    record = dataclasses.replace(platform.default_platform(), cuts_rows=not whole)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", record)
    matrix = jax.tree.map(lambda a: a[0], quantize(jnp.asarray(weights), kind, GROUP))
    x = np.random.default_rng(1).standard_normal((*rows, INPUTS)).astype(np.float32)
    plain = np.asarray(matrix.values) if kind == "float" else by_hand(matrix)
    wanted = np.einsum("...i,abi->...ab", x.astype(np.float64), plain.astype(np.float64))
    size = np.einsum(
        "...i,abi->...ab", np.abs(x), np.abs(plain)
    )  # an output's error grows with its terms, which vary much here
    for found in (jax.jit(apply)(x, matrix), jax.jit(project)(x, matrix)):
        assert found.shape == (*rows, *OUTPUTS) and found.dtype == jnp.float32
        assert np.all(np.abs(found - wanted) <= 1e-6 * size)


def test_plain_arrays_and_matrices_give_the_same():
    """A plain array has its inputs first, or, where it joins parts, its output."""
    rng = np.random.default_rng(2)
    x, w = (
        jnp.asarray(rng.standard_normal(shape).astype(np.float32))
        for shape in ((2, 3, 6), (6, 2, 4))
    )
    np.testing.assert_allclose(
        project(x, PackedWeight(w.transpose(1, 2, 0))), project(x, w), atol=1e-5
    )
    heads, out = (
        jnp.asarray(rng.standard_normal(shape).astype(np.float32))
        for shape in ((3, 2, 4), (6, 2, 4))
    )
    wanted = np.einsum("shq,dhq->sd", heads, out)
    np.testing.assert_allclose(join(heads, out, 2), wanted, atol=1e-5)
    np.testing.assert_allclose(join(heads, PackedWeight(out.reshape(6, 8)), 2), wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_half_precision_accumulates_in_f32(kind, rows):
    matrix = quantize(jnp.full((2, 512), 1.0, jnp.float32), kind, 64)
    matrix = PackedWeight(matrix.values.astype(jnp.bfloat16)) if kind == "float" else matrix
    found = apply(jnp.ones((rows, 512), jnp.bfloat16), matrix)
    assert found.dtype == jnp.bfloat16
    wanted = 512.0 * float(
        dequantize(matrix, jnp.bfloat16)[0, 0]
    )  # a running sum in bf16 would stop at 256
    np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=2**-8)


@pytest.mark.parametrize("rows", [(1,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["float", "int4"])
def test_bits_stand_for_bf16(weights, kind, rows):
    """Of weights, and of int4's scales."""
    held = quantize(jnp.asarray(weights[0]).astype(jnp.bfloat16), kind, GROUP)

    def bits(array):
        half = array.dtype == jnp.bfloat16
        return jnp.asarray(np.asarray(array).view(np.uint16)) if half else array

    x = np.random.default_rng(1).standard_normal((*rows, INPUTS)).astype(np.float32)
    found = jax.jit(apply)(x, jax.tree.map(bits, held))
    np.testing.assert_allclose(found, jax.jit(apply)(x, held), rtol=1e-4)
    np.testing.assert_array_equal(
        dequantize(jax.tree.map(bits, held), jnp.float32), dequantize(held, jnp.float32)
    )


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="groups of 10"):
        quantize(jnp.ones((2, 24)), "int4", 10)
    with pytest.raises(ValueError, match="groups of 3"):
        quantize(jnp.ones((2, 24)), "int4", 3)
