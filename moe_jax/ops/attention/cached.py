"""Attention of new tokens over a cache of earlier keys and values."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.attention.reference import MASKED
from moe_jax.ops.products import einsum_f32
from moe_jax.parallel.collectives import vary, vma
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
    table_BT: Int[Array, "B T"] | None = None,
    value_width: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H U"]:
    """`attention` over one layer of a cache whose place m holds the key and value of position m,
    for queries at any positions. Keys are [R, N, G, Q, M], or [R, N, G, M, Q] where `place_dim`
    says so, of B rows; with a table, of N blocks of M places, of which row b has `table_BT[b]`, one
    after another. A cache of bits (parallel/half_bits.py) holds bf16.

    A query sees the places up to its own position, so what lies beyond may be anything finite, and
    in blocks anything at all.
    Without `values` they are the first `value_width` entries of the keys, by default all. Only the
    blocks of places that some query may see are read, one after another, with a running softmax
    (Milakov and Gimelshein, 2018); all places at once where a loop of a length that the program
    finds out is slow. Not differentiable.
    """
    scale = q_BSHQ.shape[-1] ** -0.5 if scale is None else scale
    given = (q_BSHQ, position_BS, keys, values, table_BT)
    axes = frozenset().union(*map(vma, jax.tree.leaves(given)))
    q_BSHQ, position_BS, keys, values, table_BT = vary(given, axes)
    cached = _CachedLayer(keys, values, table_BT, layer, value_width)
    batch, length, heads, _ = q_BSHQ.shape
    groups, width = keys.shape[2], cached.value_width
    q = q_BSHQ.reshape(batch, length, groups, -1, q_BSHQ.shape[-1])
    q = jnp.moveaxis(q, 1, 3).reshape(
        batch, groups, -1, q.shape[-1]
    )  # rows: heads of the group, then positions
    position = jnp.tile(position_BS, (1, heads // groups))[:, None, :, None]
    first, end = cached.blocks(position_BS, window)
    by_row = end.ndim > 0

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = carry
        k, v, place = cached.read(first + i if by_row else i, position_BS, window, q.dtype)
        dims = "bgrd,bgdm->bgrm" if place_dim() == 4 else "bgrd,bgmd->bgrm"
        back = position - place
        scores = jnp.where(
            (back >= 0) if window is None else (back >= 0) & (back < window),
            einsum_f32(dims, q, k) * scale,
            MASKED,
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
    # Flat, and normalised all along: for one token XLA:CPU computes a reshape or division after the
    # loop again for each output of the next product.
    out = vary(jnp.zeros(math.prod(q.shape[:3]) * width, jnp.float32), vma(q))
    if default_platform().open_loops:
        start, stop = (0, jnp.max(end - first)) if by_row else (first, end)
        *_, out = lax.fori_loop(start, stop, step, (top, total, out))
    else:
        *_, out = step(jnp.int32(0), (top, total, out))
    out = out.reshape(batch, groups, heads // groups, length, width)
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width).astype(q_BSHQ.dtype)


def place_dim() -> int:
    """The dim of cached keys [R, B, G, ...] that counts places: 4, or 3 where rows of keys are read
    one after another (`Platform.places_last`).
    """
    return 4 if default_platform().places_last else 3


class _CachedLayer:
    """The keys and values of one layer of a cache, as they are read."""

    def __init__(
        self,
        keys: jax.Array,
        values: jax.Array | None,
        table_BT: jax.Array | None,
        layer: jax.Array | int,
        value_width: int | None,
    ):
        self._keys, self._values, self._table_BT, self._layer = keys, values, table_BT, layer
        self._dim, self._loops = place_dim(), default_platform().open_loops
        self._held = keys.shape[self._dim]  # places of a row, or of a block
        self._places = self._held * (1 if table_BT is None else table_BT.shape[1])
        step = self._held if table_BT is not None else math.gcd(self._held, CACHE_BLOCK)
        self._step = step if self._loops else self._places  # that are read at once
        self.value_width = value_width or keys.shape[7 - self._dim]
        if values is not None:
            self.value_width = values.shape[-1]

    def blocks(self, position_BS: jax.Array, window: int | None) -> tuple[Any, jax.Array]:
        """The first of the blocks of places that queries see, and that after the last: of all rows,
        or i32 [B], of each, in a cache of blocks.
        """
        axis = 1 if self._table_BT is not None and self._loops else None
        first: Any = 0
        if window is not None:
            first = jnp.maximum(jnp.min(position_BS, axis) - window + 1, 0) // self._step
        return first, jnp.minimum(jnp.max(position_BS, axis), self._places - 1) // self._step + 1

    def read(
        self, number: jax.Array, position_BS: jax.Array, window: int | None, dtype: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys and values [B, G, ...] of a block of places, and their numbers, which broadcast to
        [B, G, queries, places]. What other rows left in a block may be infinite, so values that
        nobody sees are zeros.
        """
        k = as_floats(self._block(self._keys, self._dim, number)).astype(dtype)
        if self._values is not None:
            v = as_floats(self._block(self._values, 3, number)).astype(dtype)
        else:
            v = k[:, :, : self.value_width] if self._dim == 4 else k[..., : self.value_width]
            v = jnp.swapaxes(v, 2, 3) if self._dim == 4 else v
        place = jnp.reshape(number, (-1, 1, 1, 1)) * self._step + jnp.arange(self._step)
        if self._table_BT is not None:
            seen = place <= jnp.max(position_BS, 1)[:, None, None, None]
            if window is not None:
                seen &= place > jnp.min(position_BS, 1)[:, None, None, None] - window
            v = jnp.where(jnp.swapaxes(seen, 2, 3), v, 0)
        return k, v, place

    def _block(self, cache: jax.Array, dim: int, number: jax.Array) -> jax.Array:
        """A block of places of each row, in an array [R, N, ...] whose dim `dim` counts places."""
        table_BT, size = self._table_BT, self._step
        if table_BT is None:
            at = (self._layer, *(number * size if d == dim else 0 for d in range(1, cache.ndim)))
            shape = (1, *(size if d == dim else cache.shape[d] for d in range(1, cache.ndim)))
            return lax.dynamic_slice(cache, at, shape, allow_negative_indices=False)[0]
        rows, parts = table_BT.shape
        if size == self._held:
            block_B = table_BT[jnp.arange(rows), jnp.minimum(number, parts - 1)]
            return cache.at[self._layer, block_B].get(mode="promise_in_bounds")
        blocks = cache.at[self._layer, table_BT].get(mode="promise_in_bounds")  # [B, T, G, ...]
        blocks = jnp.moveaxis(blocks, 1, dim - 1)
        return blocks.reshape(*blocks.shape[: dim - 1], size, *blocks.shape[dim + 1 :])


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
