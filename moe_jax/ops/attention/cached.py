"""Attention of new tokens over a cache of earlier keys and values."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.attention.reference import MASKED
from moe_jax.ops.products import einsum_f32
from moe_jax.parallel.collectives import vary, vary_alike, vma
from moe_jax.parallel.half_bits import as_floats
from moe_jax.runtime.platform import default_platform
from moe_jax.utils.annotations import Array, Float, Int, Shaped

CACHE_BLOCK = 256  # places of a cache read at once


def cached_attention(
    q_BSHQ: Float[Array, "B S H Q"],
    keys: Shaped[Array, "R N G _ _"],
    values: Shaped[Array, "R N G M U"] | None,
    layer: Int[Array, ""] | int,
    position_BS: Int[Array, "B S"],
    *,
    value_width: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H U"]:
    """`attention` over one layer of a cache whose place m holds the key and value of position m,
    for queries at any positions. Keys are [R, N, G, Q, M], or [R, N, G, M, Q] where `place_dim`
    says so; of N rows the first B are those of the queries. A cache of bits
    (parallel/half_bits.py) holds bf16.

    A query sees the places up to its own position, so what lies beyond may be anything finite.
    Without `values` they are the first `value_width` entries of the keys, by default all. Only the
    blocks of places that some query may see are read, one after another, with a running softmax
    (Milakov and Gimelshein, 2018); all places at once where a loop of a length that the program
    finds out is slow. Not differentiable.
    """
    scale = q_BSHQ.shape[-1] ** -0.5 if scale is None else scale
    arrays = (q_BSHQ, keys, position_BS) if values is None else (q_BSHQ, keys, position_BS, values)
    q_BSHQ, keys, position_BS, *rest = vary_alike(*arrays)
    batch, length, heads, _ = q_BSHQ.shape
    groups, dim = keys.shape[2], place_dim()
    places = keys.shape[dim]
    loops = default_platform().open_loops
    block = math.gcd(places, CACHE_BLOCK) if loops else places
    width = values.shape[-1] if values is not None else value_width or keys.shape[7 - dim]
    q = q_BSHQ.reshape(batch, length, groups, -1, q_BSHQ.shape[-1])
    q = jnp.moveaxis(q, 1, 3).reshape(
        batch, groups, -1, q.shape[-1]
    )  # rows: heads of the group, then positions
    position = jnp.tile(position_BS, (1, heads // groups))[:, None, :, None]

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = carry
        k = as_floats(_places(keys, batch, layer, dim, i * block, block)).astype(q.dtype)
        if rest:
            v = as_floats(_places(rest[0], batch, layer, 3, i * block, block)).astype(q.dtype)
        else:
            v = jnp.swapaxes(k[:, :, :width], 2, 3) if dim == 4 else k[..., :width]
        scores = einsum_f32("bgrd,bgdm->bgrm" if dim == 4 else "bgrd,bgmd->bgrm", q, k) * scale
        back = position - (i * block + jnp.arange(block))
        scores = jnp.where(
            (back >= 0) if window is None else (back >= 0) & (back < window), scores, MASKED
        )
        higher = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - higher[..., None])
        faded = total * jnp.exp(top - higher)
        whole = faded + jnp.sum(weights, axis=-1)
        shares = (weights / whole[..., None]).astype(v.dtype)
        part = einsum_f32("bgrm,bgmd->bgrd", shares, v)
        out = out.reshape(part.shape) * (faded / whole)[..., None] + part
        return higher, whole, out.reshape(-1)

    none = vary(jnp.zeros(q.shape[:3], jnp.float32), vma(q))
    top, total = none + MASKED, none
    if sinks_H is not None:  # as if the sink's key had been read before
        sinks = jnp.repeat(sinks_H.astype(jnp.float32).reshape(groups, -1), length, axis=1)
        top, total = none + sinks, none + 1
    first = 0 if window is None else jnp.maximum(jnp.min(position_BS) - window + 1, 0) // block
    blocks = jnp.minimum(jnp.max(position_BS), places - 1) // block + 1
    # Flat, and normalised all along: for one token XLA:CPU computes a reshape or division after the
    # loop again for each output of the next product.
    out = vary(jnp.zeros(math.prod(q.shape[:3]) * width, jnp.float32), vma(q))
    if loops:
        *_, out = lax.fori_loop(first, blocks, step, (top, total, out))
    else:
        *_, out = step(jnp.int32(0), (top, total, out))
    out = out.reshape(batch, groups, heads // groups, length, width)
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width).astype(q_BSHQ.dtype)


def place_dim() -> int:
    """The dim of cached keys [R, B, G, ...] that counts places: 4, or 3 where rows of keys are read
    one after another (`Platform.places_last`).
    """
    return 4 if default_platform().places_last else 3


def _places(
    cache: jax.Array, rows: int, layer: jax.Array | int, dim: int, start: jax.Array, size: int
) -> jax.Array:
    """`size` places of one layer of a cache [R, N, ...], whose dim `dim` counts places, in its
    first rows.
    """
    at = (layer, *(start if d == dim else 0 for d in range(1, cache.ndim)))
    sizes = (1, rows, *cache.shape[2:])
    shape = tuple(size if d == dim else whole for d, whole in enumerate(sizes))
    return lax.dynamic_slice(cache, at, shape, allow_negative_indices=False)[0]


def stored_attention(
    q_BSHQ: Float[Array, "B S H Q"],
    keys: Float[Array, "B H Q M"],
    values: Float[Array, "B H M U"],
    bias: Float[Array, "#B #H 1 M"],
) -> Float[Array, "B S H U"]:
    """Attention, whose scores are not scaled, over all places of keys and values in the order of
    a cache; `bias` is added to the scores of all queries alike, and hides a place where it is
    `MASKED`.
    """
    scores = einsum_f32("bshq,bhqm->bhsm", q_BSHQ, keys) + bias
    weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = einsum_f32("bhsm,bhmu->bhsu", weights.astype(values.dtype), values)
    # Divided behind the product, which XLA:CPU computes four times as slowly where its dims are
    # transposed at once.
    out = out / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.moveaxis(out, 1, 2).astype(q_BSHQ.dtype)
