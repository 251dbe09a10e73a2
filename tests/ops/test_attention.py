from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.mesh import make_mesh
from moe_jax.ops.attention import MAX_BLOCKS, attention
from moe_jax.schema import MeshConfig

pytestmark = pytest.mark.usefixtures("strict_promotion")

BATCH, GROUPS, HEAD = 2, 2, 8
BLOCK = 16
jitted = jax.jit(attention, static_argnames=("window", "impl"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("moe_jax.ops.attention.MIN_BLOCK", BLOCK)


def by_hand(q, k, v, segments, window):
    """The definition, in float64, query by query."""
    out = np.zeros(q.shape)
    batch, length, heads, width = q.shape
    for b, i, h in np.ndindex(batch, length, heads):
        first = 0 if window is None else max(0, i - window + 1)
        seen = [j for j in range(first, i + 1) if segments[b, j] == segments[b, i]]
        g = h // (heads // k.shape[2])
        scores = np.array([q[b, i, h] @ k[b, j, g] for j in seen], np.float64) / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights / weights.sum() @ v[b, seen, g]
    return out


def operands(length: int, heads: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """q, k, v, and segments: documents of uneven lengths, then padding, different in each sequence."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((BATCH, length, n, HEAD)).astype(np.float32) for n in (heads, GROUPS, GROUPS))
    segments = np.ones((BATCH, length), np.int32)
    segments[0, length // 3 :], segments[0, length - length // 7 :] = 2, 0
    segments[1, length // 2 + 1 :] = 2
    return tuple(jnp.array(a) for a in (q, k, v, segments))


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("window", [None, 1, 5, 30])
def test_short_sequences_equal_the_definition(impl, window):
    q, k, v, segments = operands(23, heads=4)
    out = jitted(q, k, v, segments, window=window, impl=impl)
    np.testing.assert_allclose(out, by_hand(*map(np.asarray, (q, k, v, segments)), window), atol=1e-5)


@pytest.mark.parametrize(
    ("length", "heads", "window"),
    [
        (BLOCK, 2, None),  # one block, no grouping
        (BLOCK + 1, 4, None),  # a last block of one query
        (2 * BLOCK + 7, 6, None),
        (3 * BLOCK - 1, 4, 5),  # a window shorter than a block
        (3 * BLOCK, 2, BLOCK + 9),  # and longer
        (MAX_BLOCKS * BLOCK + 16, 2, 1),  # blocks longer than the least
    ],
)
def test_blockwise_equals_reference(length, heads, window):
    *qkv, segments = operands(length, heads)
    dout = jnp.array(np.random.default_rng(1).standard_normal(qkv[0].shape).astype(np.float32))

    def value_and_gradients(impl):
        out, pull = jax.vjp(lambda *a: attention(*a, segments, window=window, impl=impl), *qkv)
        return out, *pull(dout)

    want = jax.jit(partial(value_and_gradients, "reference"))()
    for got, expected, name in zip(jax.jit(partial(value_and_gradients, "blockwise"))(), want, ("out", "dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(got, expected, atol=3e-5, err_msg=name)


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_the_future_and_other_documents_cannot_be_seen(impl):
    q, k, v, segments = operands(50, heads=2)
    start = 50 // 3  # of the second document in sequence 0
    out = jitted(q, k, v, segments, impl=impl)
    other = jitted(q, k.at[0, :start].multiply(-2.0), v.at[0, 47:].multiply(-3.0), segments, impl=impl)
    np.testing.assert_array_equal(out[0, start:43], other[0, start:43])
    np.testing.assert_array_equal(out[1], other[1])
    assert not np.allclose(out[0, 5:start], other[0, 5:start])


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_large_scores_and_half_precision(impl):
    q, k, v, segments = operands(39, heads=4)
    assert np.all(np.isfinite(jitted(q * 1e4, k * 1e4, v, segments, impl=impl)))
    half = jitted(*(a.astype(jnp.bfloat16) for a in (q, k, v)), segments, impl=impl)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), jitted(q, k, v, segments, impl="reference"), atol=0.05)


def test_inside_shard_map():
    """Keys that are the same on every device, queries that vary: the keys' gradient is the sum over devices."""
    q, k, v, segments = operands(BLOCK + 20, heads=2)
    mesh = make_mesh(MeshConfig(data=2))

    def loss(impl, q, k, v, segments):
        return jnp.sum(jnp.sin(attention(q, k, v, segments, impl=impl)))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P(), P(), P()), out_specs=(P("data"), P(), P()))
    def sharded(q, k, v, segments):
        return jax.grad(partial(loss, "blockwise"), argnums=(0, 1, 2))(q, k, v, segments)

    want = jax.jit(jax.grad(partial(loss, "reference"), argnums=(0, 1, 2)))(q, *(jnp.concatenate([a[:1]] * 2) for a in (k, v, segments)))
    dq, dk, dv = sharded(q, k[:1], v[:1], segments[:1])
    np.testing.assert_allclose(dq, want[0], atol=2e-5)
    np.testing.assert_allclose(dk[0], want[1].sum(0), atol=2e-5)
    np.testing.assert_allclose(dv[0], want[2].sum(0), atol=2e-5)


def test_unknown_back_end_is_refused(unchecked):
    with pytest.raises(ValueError, match="fancy"):
        attention(*operands(4, heads=2), impl="fancy")
