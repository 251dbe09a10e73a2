"""Each group in tiles of rows, in a loop as long as the group: no row of another group is
computed.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.grouped_matmul.reference import mask_tail
from moe_jax.parallel.collectives import vary, vma

# Rows a tile: small tiles waste less on the last tile of a group; the weight gradient re-reads its
# [D, F] accumulator for each tile, so its tiles are larger.
TILE = 48

TILE_GRAD = 128


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def tiled(x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array, transposed: bool) -> jax.Array:
    """`grouped_matmul` of x [N, D] and w [G, D, F], or [G, F, D] if `transposed`."""
    return _rows_times_matrix(x_ND, w_GDF, sizes_G, transpose=transposed)


def _tiled_fwd(
    x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array, transposed: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return tiled(x_ND, w_GDF, sizes_G, transposed), (x_ND, w_GDF, sizes_G)


def _tiled_bwd(
    transposed: bool, saved: tuple[jax.Array, ...], dy_NF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_ND, w_GDF, sizes_G = saved
    dx_ND = _rows_times_matrix(dy_NF, w_GDF, sizes_G, transpose=not transposed)
    left, right = (dy_NF, x_ND) if transposed else (x_ND, dy_NF)
    return dx_ND, _rows_outer(left, right, sizes_G).astype(w_GDF.dtype), None


tiled.defvjp(_tiled_fwd, _tiled_bwd)


def pad_rows(x_ND: jax.Array, rows: int) -> jax.Array:
    """The rows with `rows` zero rows behind them, so that the last tile can be read whole."""
    return jnp.pad(x_ND, ((0, rows), (0, 0)))


def _rows_times_matrix(
    x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array, *, transpose: bool
) -> jax.Array:
    """y = x @ w[g], or x @ w[g].T.

    A group's last tile overruns into the next group's rows, which the next group overwrites.
    """
    starts_G = jnp.cumsum(sizes_G) - sizes_G
    contract = ((1,), (1 if transpose else 0,))
    padded = pad_rows(x_ND, TILE)
    y = vary(
        jnp.zeros((padded.shape[0], w_GDF.shape[1 if transpose else 2]), x_ND.dtype), vma(x_ND)
    )

    def group(g: jax.Array, y: jax.Array) -> jax.Array:
        w = lax.dynamic_index_in_dim(w_GDF, g, keepdims=False)

        def tile(i: jax.Array, y: jax.Array) -> jax.Array:
            row = starts_G[g] + i * TILE
            rows = lax.dynamic_slice_in_dim(padded, row, TILE)
            product = lax.dot_general(
                rows, w, (contract, ((), ())), preferred_element_type=jnp.float32
            )
            return lax.dynamic_update_slice_in_dim(y, product.astype(y.dtype), row, 0)

        return lax.fori_loop(0, (sizes_G[g] + TILE - 1) // TILE, tile, y)

    y = lax.fori_loop(0, w_GDF.shape[0], group, y)
    return mask_tail(y[: x_ND.shape[0]], sizes_G)


def _rows_outer(x_ND: jax.Array, dy_NF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """dw[g] = x_g.T @ dy_g, [G, D, F] in f32.

    Rows of a tile that belong to the next group are masked out of dy.
    """
    starts_G = jnp.cumsum(sizes_G) - sizes_G
    padded_x, padded_dy = pad_rows(x_ND, TILE_GRAD), pad_rows(dy_NF, TILE_GRAD)
    zero = vary(jnp.zeros((x_ND.shape[1], dy_NF.shape[1]), jnp.float32), vma(x_ND))

    def group(g: jax.Array) -> jax.Array:
        def tile(i: jax.Array, dw: jax.Array) -> jax.Array:
            row = starts_G[g] + i * TILE_GRAD
            inside = jnp.arange(TILE_GRAD)[:, None] < sizes_G[g] - i * TILE_GRAD
            rows = lax.dynamic_slice_in_dim(padded_x, row, TILE_GRAD)
            grads = jnp.where(inside, lax.dynamic_slice_in_dim(padded_dy, row, TILE_GRAD), 0)
            return dw + lax.dot_general(
                rows, grads, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        return lax.fori_loop(0, (sizes_G[g] + TILE_GRAD - 1) // TILE_GRAD, tile, zero)

    return lax.map(group, jnp.arange(sizes_G.shape[0]))
