from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.ops.attention.api import attention
from moe_jax.ops.attention.blockwise import BLOCKS
from moe_jax.ops.attention.cached import cached_attention
from moe_jax.ops.attention.splash import splash_attention
from moe_jax.parallel.mesh import make_mesh
from moe_jax.runtime import platform

pytestmark = pytest.mark.usefixtures("strict_promotion")

BATCH, GROUPS, HEAD = 2, 2, 8
BLOCK = 16
jitted = jax.jit(attention, static_argnames=("window", "impl", "scale"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("moe_jax.ops.attention.blockwise.MIN_BLOCK", BLOCK)
    monkeypatch.setattr("moe_jax.ops.attention.blockwise.MAX_BLOCK", 2 * BLOCK)
    monkeypatch.setattr("moe_jax.ops.attention.cached.CACHE_BLOCK", BLOCK)


def by_hand(q, k, v, segments, window, scale=None, sinks=None):
    """The definition, in float64, query by query."""
    batch, length, heads, width = q.shape
    out = np.zeros((batch, length, heads, v.shape[-1]))
    scale = width**-0.5 if scale is None else scale
    for b, i, h in np.ndindex(batch, length, heads):
        first = 0 if window is None else max(0, i - window + 1)
        seen = [j for j in range(first, i + 1) if segments[b, j] == segments[b, i]]
        g = h // (heads // k.shape[2])
        scores = np.array([q[b, i, h] @ k[b, j, g] for j in seen], np.float64) * scale
        top = scores.max() if sinks is None else max(scores.max(), sinks[h])
        weights = np.exp(scores - top)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[h] - top))
        out[b, i, h] = weights / total @ v[b, seen, g]
    return out


def operands(
    length: int, heads: int, seed: int = 0, value_width: int = HEAD
) -> tuple[jax.Array, ...]:
    """q, k, v, and segments: documents of uneven lengths, then padding, different in each
    sequence.
    """
    rng = np.random.default_rng(seed)
    sizes = ((heads, HEAD), (GROUPS, HEAD), (GROUPS, value_width))
    q, k, v = (rng.standard_normal((BATCH, length, *size)).astype(np.float32) for size in sizes)
    segments = np.ones((BATCH, length), np.int32)
    segments[0, length // 3 :], segments[0, length - length // 7 :] = 2, 0
    segments[1, length // 2 + 1 :] = 2
    return tuple(jnp.array(a) for a in (q, k, v, segments))


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("window", [None, 1, 5, 30])
def test_short_sequences_equal_the_definition(impl, window):
    q, k, v, segments = operands(23, heads=4)
    out = jitted(q, k, v, segments, window=window, impl=impl)
    np.testing.assert_allclose(
        out, by_hand(*map(np.asarray, (q, k, v, segments)), window), atol=1e-5
    )


@pytest.mark.parametrize(
    ("length", "heads", "window"),
    [
        (BLOCK, 2, None),  # one block, no grouping
        (1, 2, None),  # a block of one query
        (BLOCK + 1, 4, None),  # a last block with padding
        (2 * BLOCK + 7, 6, None),
        (3 * BLOCK - 1, 4, 5),  # a window shorter than a block
        (3 * BLOCK, 2, BLOCK + 9),  # and longer
        (BLOCKS * BLOCK + 16, 2, 1),  # blocks longer than the least
        (2 * BLOCKS * BLOCK + 5, 2, 3 * BLOCK),  # more blocks of the greatest length
    ],
)
def test_blockwise_equals_reference(length, heads, window):
    *qkv, segments = operands(length, heads)
    dout = jnp.array(np.random.default_rng(1).standard_normal(qkv[0].shape).astype(np.float32))

    def value_and_gradients(impl):
        out, pull = jax.vjp(lambda *a: attention(*a, segments, window=window, impl=impl), *qkv)
        return out, *pull(dout)

    want = jax.jit(partial(value_and_gradients, "reference"))()
    for got, expected, name in zip(
        jax.jit(partial(value_and_gradients, "blockwise"))(),
        want,
        ("out", "dq", "dk", "dv"),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, atol=3e-5, err_msg=name)


def test_the_program_does_not_grow_with_the_number_of_blocks():
    def products(length: int) -> int:
        q, k, v, segments = operands(length, heads=2)

        def loss(q, k, v):
            return jnp.sum(attention(q, k, v, segments, impl="blockwise"))

        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)).count("dot_general[")

    assert products(BLOCK) == products(6 * BLOCK) == 8  # 2 forward, 5 backward, 1 for the softmax


SINKS = jnp.array([0.5, -1.0, 3.0, 40.0])  # the last takes nearly all weight


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("value_width", [HEAD - 2, HEAD + 5])
def test_sinks_scale_and_values_of_another_width(impl, window, value_width):
    q, k, v, segments = operands(2 * BLOCK + 3, heads=4, value_width=value_width)
    out = jitted(q, k, v, segments, window=window, scale=0.7, sinks_H=SINKS, impl=impl)
    np.testing.assert_allclose(
        out,
        by_hand(*map(np.asarray, (q, k, v, segments)), window, 0.7, np.asarray(SINKS)),
        atol=1e-5,
    )


@pytest.mark.parametrize("window", [None, BLOCK + 9])
def test_blockwise_gradients_with_sinks_scale_and_values_of_another_width(window):
    *qkv, segments = operands(3 * BLOCK - 1, heads=4, value_width=5)
    dout = jnp.array(
        np.random.default_rng(1).standard_normal((*qkv[0].shape[:3], 5)).astype(np.float32)
    )

    def value_and_gradients(impl):

        def fn(q, k, v, sinks):
            return attention(q, k, v, segments, window=window, scale=0.7, sinks_H=sinks, impl=impl)

        out, pull = jax.vjp(fn, *qkv, SINKS)
        return out, *pull(dout)

    want = jax.jit(partial(value_and_gradients, "reference"))()
    names = ("out", "dq", "dk", "dv", "dsinks")
    for got, expected, name in zip(
        jax.jit(partial(value_and_gradients, "blockwise"))(), want, names, strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=3e-5, err_msg=name)
    assert np.abs(want[-1][:3]).min() > 0.1  # a gradient that is there to be missed


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_the_future_and_other_documents_cannot_be_seen(impl):
    q, k, v, segments = operands(50, heads=2)
    start = 50 // 3  # of the second document in sequence 0
    out = jitted(q, k, v, segments, impl=impl)
    other = jitted(
        q, k.at[0, :start].multiply(-2.0), v.at[0, 47:].multiply(-3.0), segments, impl=impl
    )
    np.testing.assert_array_equal(out[0, start:43], other[0, start:43])
    np.testing.assert_array_equal(out[1], other[1])
    assert not np.allclose(out[0, 5:start], other[0, 5:start])


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_large_scores_and_half_precision(impl):
    q, k, v, segments = operands(39, heads=4)
    assert np.all(np.isfinite(jitted(q * 1e4, k * 1e4, v, segments, impl=impl)))
    half = jitted(*(a.astype(jnp.bfloat16) for a in (q, k, v)), segments, impl=impl)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        half.astype(np.float32), jitted(q, k, v, segments, impl="reference"), atol=0.05
    )


def test_inside_shard_map():
    """Keys that are the same on every device, queries that vary: the keys' gradient is the sum over
    devices.
    """
    q, k, v, segments = operands(BLOCK + 20, heads=2)
    mesh = make_mesh(MeshConfig(data=2))

    def loss(impl, q, k, v, segments):
        return jnp.sum(jnp.sin(attention(q, k, v, segments, impl=impl)))

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P(), P(), P()),
        out_specs=(P("data"), P(), P()),
    )
    def sharded(q, k, v, segments):
        return jax.grad(partial(loss, "blockwise"), argnums=(0, 1, 2))(q, k, v, segments)

    want = jax.jit(jax.grad(partial(loss, "reference"), argnums=(0, 1, 2)))(
        q, *(jnp.concatenate([a[:1]] * 2) for a in (k, v, segments))
    )
    dq, dk, dv = sharded(q, k[:1], v[:1], segments[:1])
    np.testing.assert_allclose(dq, want[0], atol=2e-5)
    np.testing.assert_allclose(dk[0], want[1].sum(0), atol=2e-5)
    np.testing.assert_allclose(dv[0], want[2].sum(0), atol=2e-5)


def test_unknown_back_end_is_refused(unchecked):
    with pytest.raises(ValueError, match="fancy"):
        attention(*operands(4, heads=2), impl="fancy")


# Over a cache

cached = jax.jit(cached_attention, static_argnames=("window", "value_width", "scale"))
PLACES, LAYERS = 4 * BLOCK, 3
POSITIONS = {
    "a token each, in the first block": [[0], [5]],
    "at a block's end and after it": [[BLOCK - 1], [BLOCK]],
    "rows far apart": [[2 * BLOCK - 1], [2]],
    "the last place": [[PLACES - 1], [2 * BLOCK]],
    "several tokens over an edge": [[*range(BLOCK - 2, BLOCK + 3)], [*range(5)]],
    "padding beyond the last place": [
        [*range(PLACES - 3, PLACES + 2)],
        [*range(2 * BLOCK - 3, 2 * BLOCK + 2)],
    ],
}


@pytest.mark.parametrize("form", ["plain", "sinks", "values in keys", "keys by place"])
@pytest.mark.parametrize("window", [None, 1, 5, BLOCK, BLOCK + 9])
def test_a_cache_equals_the_definition(form, window, monkeypatch):
    """For positions of all kinds; other layers and what lies beyond a row's position are large
    numbers that would show.
    """
    rng = np.random.default_rng(3)
    q_all, k, v, _ = operands(PLACES, heads=4, seed=3, value_width=6)
    sinks = SINKS if form == "sinks" else None
    by_place = form == "keys by place"
    record = dataclasses.replace(platform.default_platform(), places_last=not by_place)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", record)
    v = k[..., :6] if form == "values in keys" else v
    want = by_hand(
        *map(np.asarray, (q_all, k, v)),
        np.ones((BATCH, PLACES), np.int32),
        window,
        0.7,
        None if sinks is None else SINKS,
    )
    for name, rows in POSITIONS.items():
        positions = np.array(rows, np.int32)
        inside = np.minimum(positions, PLACES - 1)
        q = np.take_along_axis(np.asarray(q_all), inside[..., None, None], axis=1)
        beyond = np.arange(PLACES) > inside.max(axis=1)[:, None]
        keys, values = (
            rng.uniform(-50, 50, (LAYERS, *np.moveaxis(a, 1, 2).shape)).astype(np.float32)
            for a in (k, v)
        )
        for stored, new in ((keys, k), (values, v)):
            kept = np.moveaxis(np.where(beyond[..., None, None], np.float32(50), new), 1, 2)
            stored[1] = kept
        options = {"window": window, "scale": 0.7, "sinks_H": sinks}
        keys = jnp.asarray(keys if by_place else np.swapaxes(keys, -1, -2))
        if form == "values in keys":
            out = cached(jnp.asarray(q), keys, None, 1, positions, value_width=6, **options)
        else:
            out = cached(jnp.asarray(q), keys, jnp.asarray(values), 1, positions, **options)
        true = positions < PLACES
        np.testing.assert_allclose(
            out[true],
            np.take_along_axis(want, inside[..., None, None], axis=1)[true],
            atol=2e-5,
            err_msg=name,
        )
        assert np.all(np.isfinite(out))


@pytest.mark.parametrize("form", ["plain", "values in keys", "keys by place", "without loops"])
@pytest.mark.parametrize("window", [None, 5, BLOCK + 9])
def test_a_cache_of_blocks_equals_one_of_rows(form, window, monkeypatch):
    """Blocks of 64 places in any order; what a row does not see may be NaN."""
    rng, size, by_place = np.random.default_rng(6), 64, form == "keys by place"
    loops = form != "without loops"
    record = dataclasses.replace(
        platform.default_platform(), places_last=not by_place, open_loops=loops
    )
    monkeypatch.setitem(platform.PLATFORMS, "cpu", record)
    paged = jax.jit(cached_attention, static_argnames=("window", "value_width", "scale"))
    keys, values = rng.standard_normal((2, LAYERS, BATCH, GROUPS, PLACES, HEAD)).astype(np.float32)
    parts = PLACES // size
    table = rng.permutation(np.arange(1, 1 + BATCH * parts)).reshape(BATCH, parts).astype(np.int32)

    def in_blocks(rows: np.ndarray, seen: np.ndarray) -> np.ndarray:
        rows = np.where(seen[:, None, :, None], rows, np.nan)
        blocks = np.full((LAYERS, 1 + BATCH * parts, GROUPS, size, HEAD), np.nan, np.float32)
        for row, part in np.ndindex(BATCH, parts):
            blocks[:, table[row, part]] = rows[:, row, :, part * size : (part + 1) * size]
        return blocks

    def as_keys(places_before_width: np.ndarray) -> jax.Array:
        return jnp.asarray(
            places_before_width if by_place else np.swapaxes(places_before_width, -1, -2)
        )

    for name, rows in POSITIONS.items():
        positions = np.array(rows, np.int32)
        q = jnp.asarray(rng.standard_normal((*positions.shape, 4, HEAD)), jnp.float32)
        first = PLACES if window is None else window
        seen = (np.arange(PLACES) > positions.min(1)[:, None] - first) & (
            np.arange(PLACES) <= positions.max(1)[:, None]
        )
        options = {"window": window, "scale": 0.7}
        if form == "values in keys":
            of_rows = cached(q, as_keys(keys), None, 1, positions, value_width=6, **options)
            of_blocks = paged(
                *(q, as_keys(in_blocks(keys, seen)), None, 1, positions),
                **{"table_BT": table, "value_width": 6, **options},
            )
        else:
            of_rows = cached(q, as_keys(keys), jnp.asarray(values), 1, positions, **options)
            of_blocks = paged(
                *(q, as_keys(in_blocks(keys, seen)), in_blocks(values, seen), 1, positions),
                **{"table_BT": table, **options},
            )
        true = positions < PLACES
        np.testing.assert_allclose(of_blocks[true], of_rows[true], atol=2e-5, err_msg=name)
        assert np.all(np.isfinite(of_blocks))


def test_blocks_of_a_cache_that_nobody_sees_are_not_read():
    """Neither those past the last position nor those before every window: NaN there would reach the
    result.
    """
    q, k, v, _ = (np.asarray(a) for a in operands(PLACES, heads=4, seed=4))
    positions = np.array([[2 * BLOCK + 3], [2 * BLOCK + 1]], np.int32)
    keys, values = (
        np.full((1, BATCH, GROUPS, HEAD, PLACES), np.nan, np.float32),
        np.full((1, BATCH, GROUPS, PLACES, HEAD), np.nan, np.float32),
    )
    near = slice(BLOCK, 3 * BLOCK)  # a window of a block reaches back into the second block
    keys[0, ..., near], values[0, :, :, near] = (
        np.moveaxis(k, 1, 3)[..., near],
        np.swapaxes(v, 1, 2)[:, :, near],
    )
    out = cached(
        jnp.asarray(q[:, :1]), jnp.asarray(keys), jnp.asarray(values), 0, positions, window=BLOCK
    )
    assert np.all(np.isfinite(out))


def test_half_precision_over_a_cache():
    q, k, v, _ = operands(PLACES, heads=4, seed=5)
    positions = np.array([[3 * BLOCK], [7]], np.int32)
    arrays = (q[:, :1], jnp.moveaxis(k, 1, 3)[None], jnp.swapaxes(v, 1, 2)[None])
    half = cached(*(a.astype(jnp.bfloat16) for a in arrays), 0, positions)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), cached(*arrays, 0, positions), atol=0.05)
    query, *cache = (a.astype(jnp.bfloat16) for a in arrays)
    of_bits = cached(
        query, *(jnp.asarray(np.asarray(a).view(np.uint16)) for a in cache), 0, positions
    )
    np.testing.assert_allclose(of_bits.astype(np.float32), half.astype(np.float32), atol=0.01)


@pytest.mark.parametrize("window", [None, 40])
def test_the_kernel_for_tpu_equals_the_definition(window):
    """Interpreted, with its gradients, on a mesh whose types are checked."""
    rng = np.random.default_rng(0)
    batch, length, width, heads, groups = 2, 256, 128, 4, 2
    q, k, v, dout = (
        jnp.asarray(rng.standard_normal((batch, length, count, width)), jnp.float32)
        for count in (heads, groups, groups, heads)
    )
    segments = jnp.asarray([[1] * 100 + [2] * 156, [1] * 200 + [0] * 56], jnp.int32)
    axes, spread = ("data", "tensor"), P("data", None, "tensor")

    def results(attend):
        def local(q, k, v, segments, dout):
            def value(q, k, v):
                out = attend(q, k, v, segments)
                return jax.lax.psum(jnp.sum(dout * out), axes), out

            gradients, out = jax.grad(value, (0, 1, 2), has_aux=True)(q, k, v)
            return out, *gradients

        in_specs = (spread, spread, spread, P("data"), spread)
        sharded = jax.shard_map(
            local,
            mesh=make_mesh(MeshConfig(data=2, tensor=2)),
            in_specs=in_specs,
            out_specs=(spread,) * 4,
        )
        return jax.jit(sharded)(q, k, v, segments, dout)

    kernel = results(lambda *x: splash_attention(*x, window, width**-0.5, True))
    plain = results(partial(attention, window=window, impl="reference"))
    for found, wanted in zip(kernel, plain, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_the_kernel_for_tpu_is_chosen_where_it_can_run(monkeypatch):
    def chosen(length=256, width=128, dtype=jnp.bfloat16, sinks=None, impl="auto"):
        x = jnp.zeros((1, length, 2, width), dtype)
        segments = jnp.ones((1, length), jnp.int32)
        made = jax.make_jaxpr(partial(attention, impl=impl, sinks_H=sinks))(x, x, x, segments)
        return "splash" if "splash" in str(made) else "blockwise"

    with pytest.raises(
        UserError, match=r"model\.attention=splash is a kernel for TPU, and this is c"
    ):
        chosen(impl="splash")
    assert chosen() == "blockwise"
    record = dataclasses.replace(platform.default_platform(), splash_attention=True)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", record)
    assert chosen() == "splash"
    assert chosen(dtype=jnp.float32) == "blockwise" == chosen(sinks=jnp.zeros(2))
    assert chosen(length=200) == "blockwise" == chosen(width=64)
    with pytest.raises(
        UserError, match="multiples of 128; here are sequences of 200, and heads of"
    ):
        chosen(length=200, impl="splash")
    with pytest.raises(UserError, match="knows no sinks: use auto or blockwise"):
        chosen(sinks=jnp.zeros(2), impl="splash")
