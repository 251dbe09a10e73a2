from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.config.schema import MeshConfig
from moe_jax.ops.grouped_matmul import ragged
from moe_jax.ops.grouped_matmul.api import grouped_matmul
from moe_jax.ops.grouped_matmul.counted import CHOSEN_ROWS
from moe_jax.ops.grouped_matmul.packed import FEW_ROWS, SMALL_TILE
from moe_jax.ops.grouped_matmul.tiled import TILE, TILE_GRAD
from moe_jax.ops.quantized import PackedWeight, dequantize, quantize
from moe_jax.parallel.mesh import make_mesh
from moe_jax.runtime import platform
from moe_jax.runtime.metal import METAL_ON_CPU
from moe_jax.runtime.platform import standing_in

pytestmark = pytest.mark.usefixtures("strict_promotion")

WIDTH, HIDDEN, GROUPS = 24, 16, 5
ROWS = 300
SIZES = {
    "empty": [0, 0, 0, 0, 0],
    "one row": [0, 0, 1, 0, 0],
    "skew": [0, 0, ROWS, 0, 0],
    "tile - 1": [TILE - 1, 0, TILE - 1, 1, TILE - 1],
    "tile": [TILE, TILE, 0, 2 * TILE, TILE],
    "tile + 1": [TILE + 1, 0, TILE + 1, TILE + 1, 0],
    "gradient tile - 1": [TILE_GRAD - 1, 0, 0, TILE_GRAD - 1, 3],
    "gradient tile": [0, TILE_GRAD, TILE_GRAD, 0, 0],
    "gradient tile + 1": [TILE_GRAD + 1, 1, TILE_GRAD + 1, 0, 0],
    "full": [100, 50, 50, 99, 1],
}


def by_hand(x: np.ndarray, w: np.ndarray, sizes: list[int]) -> np.ndarray:
    """The definition, in float64."""
    out = np.zeros((x.shape[0], w.shape[2]))
    start = 0
    for group, size in enumerate(sizes):
        out[start : start + size] = x[start : start + size].astype(np.float64) @ w[group].astype(
            np.float64
        )
        start += size
    return out


def gradients_by_hand(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray, sizes: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    dx, dw, start = np.zeros(x.shape), np.zeros(w.shape), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        dx[rows], dw[group] = dy[rows] @ w[group].T, x[rows].T @ dy[rows]
        start += size
    return dx, dw


@pytest.fixture(scope="module")
def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((ROWS, WIDTH), (GROUPS, WIDTH, HIDDEN), (ROWS, HIDDEN))
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


BACK_ENDS = [
    (impl, transposed)
    for impl in ("reference", "ragged", "tiled", "counted", "auto")
    for transposed in (False, True)
]


@pytest.fixture(
    scope="module", params=BACK_ENDS, ids=lambda p: f"{p[0]}{' transposed' if p[1] else ''}"
)
def value_and_gradients(request):
    impl, transposed = request.param

    def both(x, w, sizes, dy):
        def fn(x, w):
            return grouped_matmul(
                x,
                jnp.swapaxes(w, 1, 2) if transposed else w,
                sizes,
                transposed=transposed,
                impl=impl,
            )

        y, pull = jax.vjp(fn, x, w)
        return y, *pull(dy)

    return jax.jit(both)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients_equal_the_definition(value_and_gradients, operands, sizes):
    x, w, dy = operands
    y, dx, dw = value_and_gradients(x, w, np.array(sizes, np.int32), dy)
    np.testing.assert_allclose(y, by_hand(x, w, sizes), atol=2e-5)
    want_dx, want_dw = gradients_by_hand(x, w, dy, sizes)
    np.testing.assert_allclose(dx, want_dx, atol=2e-5)
    np.testing.assert_allclose(dw, want_dw, atol=1e-4)
    assert not np.any(np.asarray(y)[sum(sizes) :])
    assert not np.any(np.asarray(dw)[[size == 0 for size in sizes]])


def test_rows_past_the_last_group_do_not_leak(value_and_gradients, operands):
    """Neither what they hold nor their cotangents may reach a gradient, even where they are not
    finite.
    """
    x, w, dy = (a.copy() for a in operands)
    sizes = [60, 0, 3, 70, 0]
    expected = value_and_gradients(x, w, np.array(sizes, np.int32), dy)
    x[sum(sizes) :], dy[sum(sizes) :] = 1e30, -1e30
    for got, want in zip(
        value_and_gradients(x, w, np.array(sizes, np.int32), dy), expected, strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_ragged_is_zero_past_the_last_group_where_the_kernel_writes_nothing(monkeypatch, operands):
    """As on TPU, in both passes."""
    x, w, dy = map(jnp.asarray, operands)
    sizes = jnp.array([60, 0, 3, 70, 0], jnp.int32)
    kernel = ragged.kernel

    @jax.custom_vjp
    def unwritten(x, w, sizes):
        return kernel(x, w, sizes).at[133:].set(jnp.nan)

    def backward(saved, dy):
        dx, dw = jax.vjp(lambda x, w: kernel(x, w, saved[2]), *saved[:2])[1](dy)
        return dx.at[133:].set(jnp.nan), dw, None

    unwritten.defvjp(lambda *args: (unwritten(*args), args), backward)
    monkeypatch.setattr(ragged, "kernel", unwritten)
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, impl="ragged"), x, w)
    dx, dw = pull(dy)
    np.testing.assert_array_equal(y[133:], 0)
    np.testing.assert_array_equal(dx[133:], 0)
    assert np.all(np.isfinite(y)) and np.all(np.isfinite(dx)) and np.all(np.isfinite(dw))


@pytest.mark.parametrize("impl", ["ragged", "tiled"])
def test_half_precision_keeps_no_f32_copy_of_the_rows(impl):
    x, w = jnp.ones((ROWS, WIDTH), jnp.bfloat16), jnp.ones((GROUPS, WIDTH, HIDDEN), jnp.bfloat16)
    sizes = jnp.full(GROUPS, 50, jnp.int32)

    def both(x, w):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, impl=impl), x, w)
        return y, pull(y)

    assert f"f32[{ROWS}," not in str(jax.make_jaxpr(both)(x, w))


@pytest.mark.parametrize("rows", [0, 1, TILE, TILE + 1, TILE_GRAD])
def test_any_number_of_rows(rows):
    rng = np.random.default_rng(rows)
    x, w = (
        rng.standard_normal((rows, 8)).astype(np.float32),
        rng.standard_normal((2, 8, 4)).astype(np.float32),
    )
    sizes = [rows // 3, rows - rows // 3]
    for impl in ("reference", "tiled", "counted"):
        y = grouped_matmul(jnp.array(x), jnp.array(w), jnp.array(sizes, jnp.int32), impl=impl)
        np.testing.assert_allclose(y, by_hand(x, w, sizes), atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "ragged", "tiled", "counted"])
def test_half_precision_accumulates_in_f32(impl):
    width = 512  # summed in bf16 this would be off by several percent
    x, w = jnp.ones((40, width), jnp.bfloat16), jnp.full((2, width, 4), 1.0078125, jnp.float32)
    sizes = jnp.array([17, 20], jnp.int32)
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, impl=impl), x, w)
    dx, dw = pull(jnp.ones_like(y))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(y[:37].astype(np.float32), 516.0)
    np.testing.assert_array_equal(y[37:].astype(np.float32), 0.0)
    np.testing.assert_array_equal(dw[0], 17.0)
    np.testing.assert_array_equal(dw[1], 20.0)


@pytest.mark.parametrize("impl", ["reference", "ragged", "tiled", "counted"])
def test_inside_shard_map(operands, impl):
    """Rows vary over one axis, weights are the same on it: their gradient is the sum over its
    devices.
    """
    x, w, dy = operands
    mesh = make_mesh(MeshConfig(data=2))
    sizes = np.array([[40, 1, 60, 0, 9], [0, 49, 50, 51, 0]], np.int32)

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P(), P("data"), P("data")),
        out_specs=(P("data"), P("data"), P()),
    )
    def both(x, w, sizes, dy):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes[0], impl=impl), x, w)
        return y, *pull(dy)

    y, dx, dw = both(x, w, sizes, dy)
    half = ROWS // 2
    parts = [(slice(0, half), sizes[0]), (slice(half, ROWS), sizes[1])]
    np.testing.assert_allclose(
        y, np.concatenate([by_hand(x[rows], w, s) for rows, s in parts]), atol=2e-5
    )
    grads = [gradients_by_hand(x[rows], w, dy[rows], s) for rows, s in parts]
    np.testing.assert_allclose(dx, np.concatenate([dx for dx, _ in grads]), atol=2e-5)
    np.testing.assert_allclose(dw, sum(dw for _, dw in grads), atol=1e-4)


# A Matrix, for inference

SERVED = {
    "empty": [0, 0, 0, 0, 0],
    "one row": [0, 0, 1, 0, 0],
    "a row each": [1, 1, 1, 1, 1],
    "small tile": [SMALL_TILE, 0, SMALL_TILE + 1, SMALL_TILE - 1, 3],
    "skew": [0, 0, 0, 0, 2 * TILE],
    "tile": [TILE - 1, TILE, 0, TILE + 1, 5],
}
STACKED = 3  # layers whose matrices stand one after another; the second is used


@pytest.fixture(scope="module", params=["float", "bits", "int8", "int4"])
def banks(request) -> tuple[PackedWeight, np.ndarray]:
    """Matrices [3 x G, 2, F/2, D], and the weights [G, D, F] that those of the second layer stand
    for.
    """
    w = (
        np.random.default_rng(1)
        .standard_normal((STACKED * GROUPS, 2, HIDDEN // 2, WIDTH))
        .astype(np.float32)
    )
    if request.param == "bits":
        half = np.asarray(jnp.asarray(w, jnp.bfloat16))
        matrix = PackedWeight(jnp.asarray(half.view(np.uint16)))
    else:
        matrix = quantize(jnp.asarray(w), request.param, 8)
    plain = np.asarray(dequantize(matrix, jnp.float32)).reshape(STACKED, GROUPS, HIDDEN, WIDTH)
    return matrix, plain[1].swapaxes(1, 2)


@pytest.fixture(scope="module")
def served():
    """Rows one by one, as `auto` has it for few, and tiles, of both sizes."""
    return jax.jit(grouped_matmul, static_argnames=("impl",))


@pytest.mark.parametrize("rows", [FEW_ROWS, SMALL_TILE * GROUPS, ROWS])
@pytest.mark.parametrize("impl", ["rows", "short", "tiled", "counted", "chosen"])
def test_a_matrix_equals_the_definition(served, banks, operands, impl, rows):
    matrix, plain = banks
    for name, sizes in SERVED.items():
        if sum(sizes) <= rows:
            y = served(
                operands[0][:rows], matrix, np.array(sizes, np.int32), first=GROUPS, impl=impl
            )
            np.testing.assert_allclose(
                y, by_hand(operands[0][:rows], plain, sizes), atol=3e-5, err_msg=name
            )
            assert not np.any(np.asarray(y)[sum(sizes) :]), name


@pytest.mark.parametrize("impl", ["rows", "short", "tiled", "counted", "chosen"])
def test_rows_past_the_last_group_of_matrices_are_zero_whatever_they_hold(
    served, banks, operands, impl
):
    x, sizes = operands[0][:FEW_ROWS].copy(), [60, 0, 3, 20, 0]
    x[sum(sizes) :] = np.nan
    y = np.asarray(served(x, banks[0], np.array(sizes, np.int32), first=GROUPS, impl=impl))
    assert not np.any(y[sum(sizes) :]) and np.all(np.isfinite(y))


def test_auto_takes_rows_for_few_and_tiles_for_more(served, banks, operands):
    sizes = np.array([20, 0, 50, 7, 3], np.int32)
    few = "short" if banks[0].values.dtype == np.uint16 else "rows"  # bf16, several per group
    for rows, impl in ((2 * GROUPS, "rows"), (FEW_ROWS, few), (FEW_ROWS + 1, "tiled")):
        text = [
            jax.jit(partial(grouped_matmul, impl=i))
            .lower(operands[0][:rows], banks[0], sizes)
            .as_text()
            for i in ("auto", impl)
        ]
        assert text[0] == text[1]


def test_auto_walks_tiles_of_packed_weights_where_a_kernel_would_copy_them(
    banks, operands, monkeypatch
):
    sizes, rows = np.array([20, 0, 50, 7, 3], np.int32), operands[0][: FEW_ROWS + 1]

    def text(impl: str, weights: PackedWeight | np.ndarray) -> str:
        return jax.jit(partial(grouped_matmul, impl=impl)).lower(rows, weights, sizes).as_text()

    record = dataclasses.replace(platform.default_platform(), ragged_dot=True)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", record)
    assert text("auto", banks[0]) == text("ragged", banks[0])
    record = dataclasses.replace(record, packed_tile=TILE + 8)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", record)
    assert f"tensor<{TILE + 8}x{WIDTH}x" in text("auto", banks[0])
    plain = np.zeros((GROUPS, WIDTH, HIDDEN), np.float32)
    assert text("auto", plain) == text("ragged", plain)


def test_auto_on_metal_takes_what_has_no_open_loop(banks, operands):
    sizes = np.array([2, 0, 5, 7, 3], np.int32)
    for rows, impl in ((CHOSEN_ROWS, "chosen"), (CHOSEN_ROWS + 1, "counted")):
        with standing_in(METAL_ON_CPU):
            text = [
                jax.jit(partial(grouped_matmul, impl=i))
                .lower(operands[0][:rows], banks[0], sizes)
                .as_text()
                for i in ("auto", impl)
            ]
        assert text[0] == text[1]
        assert text[0].count("stablehlo.while") == (impl == "counted")


def test_unknown_back_end_is_refused(unchecked):
    with pytest.raises(ValueError, match="fancy"):
        grouped_matmul(
            jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2], jnp.int32), impl="fancy"
        )
