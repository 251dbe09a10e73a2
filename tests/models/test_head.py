"""The loss of a batch over a mesh: the vocabulary may be split over any of the batch's axes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config.schema import MeshConfig
from moe_jax.models import head
from moe_jax.parallel.collectives import BATCH_AXES
from moe_jax.parallel.mesh import make_mesh
from moe_jax.profiling import hlo

WIDTH, VOCAB, TOKENS = 16, 42, 56  # of all devices; no split of the vocabulary but by 2 is even
DATA, EXPERT = (("data",), ("expert",))


@pytest.fixture(scope="module")
def operands() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    h, w = rng.standard_normal((TOKENS, WIDTH)), rng.standard_normal((WIDTH, VOCAB))
    target = rng.integers(0, VOCAB, TOKENS).astype(np.int32)
    target[:4] = [0, VOCAB - 1, VOCAB // 2 - 1, VOCAB // 2]  # the ends of `tensor`'s parts
    weight = rng.random(TOKENS) * (rng.random(TOKENS) < 0.8)
    return tuple(
        jnp.asarray(a, None if a is target else jnp.float32) for a in (h, w, target, weight)
    )


@jax.jit
def by_optax(h, w, target, weight):
    def loss(h, w):
        return jnp.sum(weight * optax.softmax_cross_entropy_with_integer_labels(h @ w, target))

    return jax.value_and_grad(loss, argnums=(0, 1))(h, w)


def compiled_loss(mesh: MeshConfig, operands: tuple[jax.Array, ...]):
    """The compiled (loss, gradients) of the batch on a mesh, and what it gives."""
    tokens, matrix = P(BATCH_AXES), P(BATCH_AXES, "tensor")

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=make_mesh(mesh),
        in_specs=(tokens, matrix, tokens, tokens),
        out_specs=(P(), (tokens, matrix)),
    )
    def sharded(h, w, target, weight):
        def loss(h, w):
            param = nnx.Param(
                w, axes=("width", "vocab"), mesh_axes=(BATCH_AXES, ("tensor",)), std=None
            )
            return head.batch_loss(param, h, target, weight)

        return jax.value_and_grad(loss, argnums=(0, 1))(h, w)

    compiled = sharded.lower(*operands).compile()
    return compiled, sharded(*operands)


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ((2, 4, 1), DATA),
        ((2, 4, 1), EXPERT),
        ((4, 2, 1), BATCH_AXES),
        ((2, 2, 2), DATA),
        ((2, 2, 2), BATCH_AXES),
        ((2, 4, 1), ()),
    ],
)
def test_value_and_gradients_equal_optax_however_the_vocabulary_is_split(
    monkeypatch, operands, sizes, axes
):
    monkeypatch.setattr("moe_jax.models.head.vocabulary_axes", lambda *_: axes)
    monkeypatch.setattr("moe_jax.ops.cross_entropy.CHUNK", 4)  # of 7 or 14: padding too
    mesh = MeshConfig(**dict(zip(("data", "expert", "tensor"), sizes, strict=True)))
    compiled, (value, (dh, dw)) = compiled_loss(mesh, operands)
    expected, (expected_dh, expected_dw) = by_optax(*operands)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(dh, expected_dh, atol=2e-5)
    np.testing.assert_allclose(dw, expected_dw, atol=2e-4)
    # No device has the whole head, nor its whole gradient, and sums are of single rows.
    if axes:
        moved = [entry for entry in hlo.collectives(compiled.as_text()) if entry.group > 1]
        matrix = WIDTH * VOCAB * 4
        assert max(entry.bytes // entry.times for entry in moved) < matrix
        reduced = [entry.bytes // entry.times for entry in moved if entry.op == "all-reduce"]
        assert max(reduced) <= 4 * 8 * 4 * 2 or sizes[2] > 1  # hidden states over `tensor`


@pytest.mark.parametrize(
    ("tokens", "vocab", "data", "expert", "axes"),
    [
        (4096, 151_936, 4, 16, DATA),  # 49,679 rows of D values; expert 70,787; none 149,562
        (1024, 151_936, 4, 16, EXPERT),  # 24,707 beside 40,463 over data
        (256, 32_000, 2, 4, BATCH_AXES),
        (65_536, 32_000, 2, 4, ()),
        (256, 32_000, 1, 1, ()),
        (256, 32_000, 1, 8, EXPERT),
    ],
)
def test_the_split_is_the_one_with_the_fewest_bytes(tokens, vocab, data, expert, axes):
    sizes = {"data": data, "expert": expert}
    assert head.vocabulary_axes(2048, vocab, tokens, sizes) == axes
    assert head.vocabulary_axes(2, vocab, tokens, sizes) == ()  # a small head is gathered


def test_what_travels_in_a_loss_is_counted():
    sizes = {"data": 4, "expert": 16}
    assert head.collective_values(2048, 151_936, 4096, sizes) == (
        (37_984 + 4 * 4096) * 2048,
        151_936 * 2048 // 64,
    )
    assert head.collective_values(8, 100, 4096, sizes) == (800, 0)
