"""The product with packed weights, as inference holds them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.grouped_matmul.ragged import ragged
from moe_jax.ops.grouped_matmul.reference import mask_tail
from moe_jax.ops.grouped_matmul.tiled import TILE, pad_rows
from moe_jax.ops.linear import apply
from moe_jax.ops.quantized import PackedWeight, dequantize
from moe_jax.parallel.collectives import vary, vma
from moe_jax.runtime.platform import default_platform

SMALL_TILE = 16  # for a `PackedWeight` whose groups have about so few rows

FEW_ROWS = 128  # up to which a `PackedWeight` is read once per row

SHORT_TILE = 8  # of those few rows, where groups have several each


def packed_rows(
    x_ND: jax.Array, w: PackedWeight, sizes_G: jax.Array, first: jax.Array | int
) -> jax.Array:
    """One row after another. Rows of one group follow each other, so its weights come from the
    cache after the first.
    """
    x_ND, w, sizes_G, zeros = varying_alike(x_ND, w, sizes_G)
    ends_G = jnp.cumsum(sizes_G)

    def row(i: jax.Array, y: jax.Array) -> jax.Array:
        group = jnp.sum(ends_G <= i) + first
        x = lax.dynamic_slice_in_dim(x_ND, i, 1)
        return lax.dynamic_update_slice_in_dim(
            y, apply(x, take_matrix(w, group)).reshape(1, -1), i, 0
        )

    return lax.fori_loop(0, ends_G[-1], row, zeros(x_ND.shape[0]))


def packed_short(
    x_ND: jax.Array, w: PackedWeight, sizes_G: jax.Array, first: jax.Array | int
) -> jax.Array:
    """Tiles of a few rows, in one loop over those that there are: a group of no rows costs
    nothing, and one of several is cut out for all of them.
    """
    x_ND, w, sizes_G, zeros = varying_alike(x_ND, w, sizes_G)
    tiles_G = (sizes_G + SHORT_TILE - 1) // SHORT_TILE
    ends_G, starts_G = jnp.cumsum(tiles_G), jnp.cumsum(sizes_G) - sizes_G
    padded = pad_rows(x_ND, SHORT_TILE)

    def tile(i: jax.Array, y: jax.Array) -> jax.Array:
        group = jnp.sum(ends_G <= i)
        row = starts_G[group] + (i - (ends_G - tiles_G)[group]) * SHORT_TILE
        rows = lax.dynamic_slice_in_dim(padded, row, SHORT_TILE)
        product = apply(rows, take_matrix(w, group + first)).reshape(SHORT_TILE, -1)
        return lax.dynamic_update_slice_in_dim(y, product, row, 0)

    y = lax.fori_loop(0, ends_G[-1], tile, zeros(padded.shape[0]))
    return mask_tail(y[: x_ND.shape[0]], sizes_G)


def packed_ragged(
    x_ND: jax.Array, w: PackedWeight, sizes_G: jax.Array, first: jax.Array | int
) -> jax.Array:
    """`lax.ragged_dot` over the groups' matrices, dequantised all at once."""
    x_ND, w, sizes_G, _ = varying_alike(x_ND, w, sizes_G)
    groups = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, sizes_G.shape[0]), w)
    dense = dequantize(groups, x_ND.dtype)
    w_GDF = jnp.swapaxes(dense.reshape(dense.shape[0], -1, dense.shape[-1]), 1, 2)
    return ragged(x_ND, w_GDF, sizes_G)


def packed_tiles(
    x_ND: jax.Array, w: PackedWeight, sizes_G: jax.Array, first: jax.Array | int
) -> jax.Array:
    """The tiled walk of `_rows_times_matrix`, dequantising one group's matrix at a time, or a part
    of it at a time inside the product (`Platform.packed_tile`).
    """
    x_ND, w, sizes_G, zeros = varying_alike(x_ND, w, sizes_G)
    starts_G = jnp.cumsum(sizes_G) - sizes_G
    large = default_platform().packed_tile
    few = x_ND.shape[0] <= SMALL_TILE * sizes_G.shape[0]
    tile_rows = SMALL_TILE if few else large or TILE
    padded = pad_rows(x_ND, tile_rows)

    def group(g: jax.Array, y: jax.Array) -> jax.Array:
        weights = take_matrix(w, g + first)
        if large is None:
            weights = PackedWeight(dequantize(weights, x_ND.dtype))

        def tile(i: jax.Array, y: jax.Array) -> jax.Array:
            row = starts_G[g] + i * tile_rows
            product = apply(lax.dynamic_slice_in_dim(padded, row, tile_rows), weights)
            return lax.dynamic_update_slice_in_dim(y, product.reshape(tile_rows, -1), row, 0)

        return lax.fori_loop(0, (sizes_G[g] + tile_rows - 1) // tile_rows, tile, y)

    y = lax.fori_loop(0, sizes_G.shape[0], group, zeros(padded.shape[0]))
    return mask_tail(y[: x_ND.shape[0]], sizes_G)


def take_matrix(w: PackedWeight, index: jax.Array) -> PackedWeight:
    """The matrix of one group; the index reaches the product's read, so that nothing is copied."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), w)


def varying_alike(x_ND: jax.Array, w: PackedWeight, sizes_G: jax.Array) -> tuple[Any, ...]:
    """All typed as varying over the same mesh axes, and a zero array for the results."""
    axes = frozenset().union(*(vma(a) for a in jax.tree.leaves((x_ND, w, sizes_G))))
    x_ND, w, sizes_G = vary((x_ND, w, sizes_G), axes)
    outputs = math.prod(w.values.shape[1:-1])
    return x_ND, w, sizes_G, lambda rows: vary(jnp.zeros((rows, outputs), x_ND.dtype), axes)
