"""Tiles of rows in a loop whose length is known when it is compiled, and few rows without a loop.

A group's rows are cut into tiles, of which there are at most one per group more than the rows need.
Each turn computes one; what is left over writes zeros behind the rows. Where the length of a loop
is found out by the program, as in `tiled`, some platforms wait for the host at each turn
(`Platform.open_loops`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.grouped_matmul.packed import SMALL_TILE, take_matrix, varying_alike
from moe_jax.ops.grouped_matmul.reference import group_of, mask_tail
from moe_jax.ops.grouped_matmul.tiled import pad_rows
from moe_jax.ops.linear import apply
from moe_jax.ops.products import dot
from moe_jax.ops.quantized import PackedWeight
from moe_jax.parallel.collectives import vary, vma

COUNTED_TILE = 64  # rows, where groups have more than about SMALL_TILE
CHOSEN_ROWS = 32  # up to which every row takes a copy of its matrix: those of a few tokens


class Tiles(NamedTuple):
    """How groups are cut into tiles."""

    size: int
    turns: int  # of the loop
    group_C: jax.Array
    row_C: jax.Array  # where each begins; N, behind all rows, for those left over
    rows_C: jax.Array  # how many of its rows are its group's


def cut(rows: int, sizes_G: jax.Array) -> Tiles:
    """The tiles of N = `rows` rows."""
    groups = sizes_G.shape[0]
    size = SMALL_TILE if rows <= SMALL_TILE * groups else COUNTED_TILE
    count = max(1, (rows + min(groups, rows) * (size - 1)) // size)
    tiles_G = lax.div(sizes_G + (size - 1), jnp.int32(size))
    ends_G, start_G = jnp.cumsum(tiles_G), jnp.cumsum(sizes_G) - sizes_G
    turn_C = jnp.arange(count, dtype=jnp.int32)
    group_C = group_of(turn_C, ends_G)
    before_C = (turn_C - (ends_G - tiles_G)[group_C]) * size
    used_C = turn_C < ends_G[-1]
    row_C = jnp.where(used_C, start_G[group_C] + before_C, rows)
    rows_C = jnp.where(used_C, jnp.clip(sizes_G[group_C] - before_C, 0, size), 0)
    return Tiles(size, count, group_C, row_C, rows_C)


def packed_chosen(
    x_ND: jax.Array, w: PackedWeight, sizes_G: jax.Array, first: jax.Array | int
) -> jax.Array:
    """Every row times a copy of its group's matrix, all at once."""
    x_ND, w, sizes_G, _ = varying_alike(x_ND, w, sizes_G)
    group_N = group_of(jnp.arange(x_ND.shape[0], dtype=jnp.int32), jnp.cumsum(sizes_G)) + first
    chosen = jax.tree.map(lambda a: a.at[group_N].get(mode="promise_in_bounds"), w)
    y = jax.vmap(lambda x, matrix: apply(x[None], matrix).reshape(-1))(x_ND, chosen)
    return mask_tail(y, sizes_G)


def packed_counted(
    x_ND: jax.Array, w: PackedWeight, sizes_G: jax.Array, first: jax.Array | int
) -> jax.Array:
    """Tile by tile, each dequantising its group's matrix."""
    x_ND, w, sizes_G, zeros = varying_alike(x_ND, w, sizes_G)
    tiles = cut(x_ND.shape[0], sizes_G)

    def product(rows: jax.Array, group: jax.Array) -> jax.Array:
        return apply(rows, take_matrix(w, group + first)).reshape(tiles.size, -1)

    y = _tile_by_tile(x_ND, tiles, zeros(x_ND.shape[0] + tiles.size), product)
    return mask_tail(y, sizes_G)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def counted(x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array, transposed: bool) -> jax.Array:
    """`grouped_matmul` of x [N, D] and w [G, D, F], or [G, F, D] if `transposed`."""
    tiles = cut(x_ND.shape[0], sizes_G)
    contract = ((1,), (1 if transposed else 0,))

    def product(rows: jax.Array, group: jax.Array) -> jax.Array:
        w = lax.dynamic_index_in_dim(w_GDF, group, keepdims=False)
        return dot(rows, w, contract, x_ND.dtype)

    shape = (x_ND.shape[0] + tiles.size, w_GDF.shape[1 if transposed else 2])
    zeros = vary(jnp.zeros(shape, x_ND.dtype), vma(x_ND))
    return mask_tail(_tile_by_tile(x_ND, tiles, zeros, product), sizes_G)


def _counted_fwd(
    x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array, transposed: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return counted(x_ND, w_GDF, sizes_G, transposed), (x_ND, w_GDF, sizes_G)


def _counted_bwd(
    transposed: bool, saved: tuple[jax.Array, ...], dy_NF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_ND, w_GDF, sizes_G = saved
    dx_ND = counted(dy_NF, w_GDF, sizes_G, not transposed)
    left, right = (dy_NF, x_ND) if transposed else (x_ND, dy_NF)
    return dx_ND, _outer(left, right, sizes_G).astype(w_GDF.dtype), None


counted.defvjp(_counted_fwd, _counted_bwd)


def _tile_by_tile(
    x_ND: jax.Array,
    tiles: Tiles,
    y: jax.Array,
    product: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """The products of all tiles, [N, F], put into `y` [N + size, F].

    A group's last tile overruns into the next group's rows, which the next group overwrites.
    """
    padded = pad_rows(x_ND, tiles.size)

    def turn(i: jax.Array, y: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(padded, tiles.row_C[i], tiles.size)
        part = product(rows, tiles.group_C[i])
        return lax.dynamic_update_slice_in_dim(y, part, tiles.row_C[i], 0)

    return lax.fori_loop(0, tiles.turns, turn, y)[: x_ND.shape[0]]


def _outer(x_ND: jax.Array, dy_NF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """dw[g] = x_g.T @ dy_g, [G, D, F] in f32. Rows of a tile that are not its group's count as
    zeros.
    """
    tiles = cut(x_ND.shape[0], sizes_G)
    padded_x, padded_dy = pad_rows(x_ND, tiles.size), pad_rows(dy_NF, tiles.size)
    shape = (sizes_G.shape[0], x_ND.shape[1], dy_NF.shape[1])

    def turn(i: jax.Array, dw: jax.Array) -> jax.Array:
        inside = jnp.arange(tiles.size)[:, None] < tiles.rows_C[i]
        rows = lax.dynamic_slice_in_dim(padded_x, tiles.row_C[i], tiles.size)
        grads = jnp.where(
            inside, lax.dynamic_slice_in_dim(padded_dy, tiles.row_C[i], tiles.size), 0
        )
        before = lax.dynamic_index_in_dim(dw, tiles.group_C[i], keepdims=False)
        after = before + dot(rows, grads, ((0,), (0,)))
        return lax.dynamic_update_index_in_dim(dw, after, tiles.group_C[i], 0)

    zeros = vary(jnp.zeros(shape, jnp.float32), vma(x_ND))
    return lax.fori_loop(0, tiles.turns, turn, zeros)
