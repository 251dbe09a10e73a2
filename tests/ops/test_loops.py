"""Loops that stack, written out where a platform cannot stack."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.loops import map_over, scan
from moe_jax.runtime.metal import METAL_ON_CPU
from moe_jax.runtime.platform import standing_in


def running(x):
    total, sums = scan(lambda c, one: (c + one, c * one), jnp.float32(1), x)
    return total, sums, map_over(lambda one: one * one, x)


@pytest.mark.parametrize("length", [1, 5])
def test_the_same_with_and_without_a_loop(length):
    x = jnp.arange(1.0, length + 1)

    def loss(x):
        total, sums, squares = running(x)
        return total + jnp.sum(sums * squares)

    normal = jax.jit(jax.value_and_grad(loss))
    assert length == 1 or "stablehlo.while" in normal.lower(x).as_text()
    with standing_in(METAL_ON_CPU):
        written_out = jax.jit(jax.value_and_grad(lambda x: loss(x)))
        assert "stablehlo.while" not in written_out.lower(x).as_text()
    for found, wanted in zip(written_out(x), normal(x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
