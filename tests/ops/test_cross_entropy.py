from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.config.schema import MeshConfig
from moe_jax.ops.cross_entropy import linear_cross_entropy, logits
from moe_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("strict_promotion")

VOCAB, WIDTH = 40, 12
CHUNK = 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("moe_jax.ops.cross_entropy.CHUNK", CHUNK)


def operands(tokens: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(tokens)
    h, w = (
        rng.standard_normal((tokens, WIDTH)).astype(np.float32),
        rng.standard_normal((WIDTH, VOCAB)).astype(np.float32),
    )
    target = rng.integers(0, VOCAB, tokens).astype(np.int32)
    target[: min(2, tokens)] = [0, VOCAB - 1][: min(2, tokens)]  # the ends of the vocabulary
    weight = (rng.random(tokens) * (rng.random(tokens) < 0.8)).astype(np.float32)
    return tuple(jnp.array(a) for a in (h, w, target, weight))


@jax.jit
def by_optax(h, w, target, weight):
    return jnp.sum(weight * optax.softmax_cross_entropy_with_integer_labels(h @ w, target))


@pytest.mark.parametrize("tokens", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_value_and_gradients_equal_optax(impl, tokens):
    h, w, target, weight = operands(tokens)
    loss = partial(linear_cross_entropy, impl=impl)
    value, (dh, dw) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(h, w, target, weight)
    expected, (expected_dh, expected_dw) = jax.jit(jax.value_and_grad(by_optax, argnums=(0, 1)))(
        h, w, target, weight
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(
        jax.jit(loss)(h, w, target, weight), expected, rtol=1e-5
    )  # without a gradient
    np.testing.assert_allclose(dh, expected_dh, atol=1e-5)
    np.testing.assert_allclose(dw, expected_dw, atol=1e-4)


@pytest.mark.parametrize("tokens", [9, CHUNK + 3])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_sharded_vocabulary(impl, tokens):
    """Tokens over `data`, vocabulary over `tensor`: the same loss and gradients as on one
    device.
    """
    h, w, target, weight = (
        jnp.concatenate([a, a]) if i != 1 else a for i, a in enumerate(operands(tokens))
    )
    mesh = make_mesh(MeshConfig(data=2, tensor=4))

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P(None, "tensor"), P("data"), P("data")),
        out_specs=(P(), (P("data"), P(None, "tensor"))),
    )
    def sharded(h, w, target, weight):
        def loss(h, w):
            return jax.lax.psum(
                2.0 * linear_cross_entropy(h, w, target, weight, axis="tensor", impl=impl), "data"
            )

        return jax.value_and_grad(loss, argnums=(0, 1))(h, w)

    value, (dh, dw) = sharded(h, w, target, weight)
    expected, (expected_dh, expected_dw) = jax.jit(jax.value_and_grad(by_optax, argnums=(0, 1)))(
        h, w, target, weight
    )
    np.testing.assert_allclose(value, 2 * expected, rtol=1e-5)
    np.testing.assert_allclose(dh, 2 * expected_dh, atol=2e-5)
    np.testing.assert_allclose(dw, 2 * expected_dw, atol=2e-4)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_even_logits_cost_the_log_of_the_vocabulary_and_huge_ones_stay_finite(impl):
    target, weight = jnp.array([3, 9], jnp.int32), jnp.ones(2, jnp.float32)
    loss = partial(linear_cross_entropy, impl=impl)
    even = jax.jit(loss)(jnp.zeros((2, WIDTH)), jnp.ones((WIDTH, VOCAB)), target, weight)
    np.testing.assert_allclose(even, 2 * np.log(VOCAB), rtol=1e-6)
    h, w, *_ = operands(2)
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(1e4 * h, w, target, weight)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in grads)


def test_half_precision_has_f32_logits_and_an_f32_gradient_of_the_masters():
    h, w, target, weight = operands(CHUNK + 1)
    half = h.astype(jnp.bfloat16)
    assert logits(half, w).dtype == jnp.float32
    value, (dh, dw) = jax.jit(jax.value_and_grad(linear_cross_entropy, argnums=(0, 1)))(
        half, w, target, weight
    )
    assert (value.dtype, dh.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(value, by_optax(h, w, target, weight), rtol=0.01)


def test_unknown_back_end_is_refused(unchecked):
    with pytest.raises(ValueError, match="fancy"):
        linear_cross_entropy(*operands(4), impl="fancy")
