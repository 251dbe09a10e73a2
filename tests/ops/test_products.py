"""Products of bf16 matrices add up in f32, on platforms that can give f32 results and others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.products import dot, einsum_f32
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
