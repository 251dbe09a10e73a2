"""Products of bf16 matrices add up in f32, on platforms that can give f32 results and others, and
with a matrix that is there as bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.products import dot, dot_bits, einsum_f32
from moe_jax.runtime.metal import METAL_ON_CPU
from moe_jax.runtime.platform import standing_in

WIDTH = 512  # ones added up in bf16 would stop at 256


@pytest.fixture(params=[None, METAL_ON_CPU], ids=["cpu", METAL_ON_CPU], autouse=True)
def on_platform(request):
    with standing_in(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_dot_adds_up_in_f32(dtype, on_platform):
    x, y = jnp.ones((3, WIDTH), jnp.bfloat16), jnp.full((4, WIDTH), 1.0078125, jnp.bfloat16)
    product = jax.jit(lambda x, y: dot(x, y, ((1,), (1,)), dtype))
    found = product(x, y)
    assert found.dtype == dtype and found.shape == (3, 4)
    np.testing.assert_array_equal(found.astype(np.float32), 516.0)
    mixed = "xbf16>) -> tensor<3x4xf32>" in product.lower(x, y).as_text()
    assert mixed == (on_platform is None)


def test_an_einsum_is_in_f32(on_platform):
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    found = jax.jit(lambda x: einsum_f32("nd,nd->n", x, x + 2**-7))(x)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, 516.0)


def test_products_of_f32_stay_as_exact_as_asked(on_platform):
    x = jnp.ones((2, 3), jnp.float32)
    text = jax.jit(lambda x: dot(x, x, ((1,), (1,)), precision=jax.lax.Precision.HIGHEST))
    assert "HIGHEST" in text.lower(x).as_text()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 1024), (20, 1100)])  # whole blocks, and not
def test_a_matrix_of_bits(rows, inputs, outputs):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, inputs)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((inputs, outputs)), jnp.bfloat16)
    product = jax.jit(dot_bits)
    bits = jnp.asarray(np.asarray(w).view(np.uint16))
    wanted = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    found = product(x, bits)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5 * inputs)
    # Never all of it as f32, or as bf16, which would be converted whole.
    text = product.lower(x, bits).as_text()
    assert f"{inputs}x{outputs}xui16" in text
    assert f"{inputs}x{outputs}xf32" not in text and f"{inputs}x{outputs}xbf16" not in text
