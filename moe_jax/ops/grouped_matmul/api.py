"""Grouped matmul: rows sorted by group, each group multiplied by its own matrix.

Back ends: `reference` multiplies every row by every matrix and selects (for tests); `ragged` is
`lax.ragged_dot`, right on GPU and TPU, but a masked dense product over every group on CPU; `tiled` walks
each group in tiles of rows with plain matmuls, fast on CPU; `rows`, for a `Matrix` alone, takes one row after
another, for the few rows of decoding, where reading weights is all the time. `auto` takes `rows` for a `Matrix`
and few rows, else `ragged` on GPU and TPU and `tiled` elsewhere. Measurements behind the tile sizes are in
docs/benchmarks.md and docs/log.md.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.linear import Matrix, apply, dequantize
from moe_jax.parallel.collectives import vary, vary_alike, vma
from moe_jax.utils.annotations import Array, Float, Int

Impl = Literal["auto", "reference", "ragged", "tiled", "rows"]

# Rows a tile: small tiles waste less on the last tile of a group; the weight gradient re-reads its [D, F]
# accumulator for each tile, so its tiles are larger.
TILE = 48
TILE_GRAD = 128
SMALL_TILE = 16  # for a `Matrix` whose groups have about so few rows
FEW_ROWS = 128  # up to which a `Matrix` is read once a row


def grouped_matmul(
    x_ND: Float[Array, "N D"],
    w_GDF: Float[Array, "G _ _"] | Matrix,
    sizes_G: Int[Array, " G2"],
    *,
    transposed: bool = False,
    first: jax.Array | int = 0,
    impl: Impl = "auto",
) -> Float[Array, "N F"]:
    """Multiplies consecutive runs of rows by their group's matrix.

    Rows of group g are the `sizes_G[g]` rows after those of the groups before it; rows beyond the last
    group give zeros. Groups of no rows get zero gradient. Group g's matrix is number first + g of `w_GDF`. With `transposed`
    the matrices are given as [G, F, D]; a `Matrix` [G, *outputs, D], for inference only, always is. Products accumulate in
    f32; the result has the dtype of `x_ND`. Raises ValueError for an unknown `impl`.
    """
    accelerated = jax.default_backend() in ("gpu", "tpu")
    if isinstance(w_GDF, Matrix):
        if impl == "rows" or (impl == "auto" and x_ND.shape[0] <= FEW_ROWS):
            return _matrix_rows(x_ND, w_GDF, sizes_G, first)
        if impl == "ragged" or (impl == "auto" and accelerated):
            return _matrix_ragged(x_ND, w_GDF, sizes_G, first)
        if impl not in ("auto", "tiled", "reference"):
            raise _unknown(impl)
        return _matrix_tiles(x_ND, w_GDF, sizes_G, first)
    if impl == "auto":
        impl = "ragged" if accelerated else "tiled"
    x_ND, w_GDF, sizes_G = vary_alike(x_ND, w_GDF.astype(x_ND.dtype), sizes_G)
    if w_GDF.shape[0] != sizes_G.shape[0]:
        w_GDF = lax.dynamic_slice_in_dim(w_GDF, first, sizes_G.shape[0])
    if impl == "tiled":
        return _tiled(x_ND, w_GDF, sizes_G, transposed)
    w_GDF = jnp.swapaxes(w_GDF, 1, 2) if transposed else w_GDF
    if impl == "reference":
        return _reference(x_ND, w_GDF, sizes_G)
    if impl == "ragged":
        return _mask_tail(_ragged(x_ND, w_GDF, sizes_G), sizes_G)
    raise _unknown(impl)


def _unknown(impl: str) -> ValueError:
    return ValueError(f"impl={impl!r} is not a back end of grouped_matmul: use auto, reference, ragged or tiled (rows needs a Matrix)")


def _one(w: Matrix, index: jax.Array) -> Matrix:
    """The matrix of one group; the index reaches the product's read, so that nothing is copied."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), w)


def _varying(x_ND: jax.Array, w: Matrix, sizes_G: jax.Array) -> tuple[Any, ...]:
    """All typed as varying over the same mesh axes, and a zero array for the results."""
    axes = frozenset().union(*(vma(a) for a in jax.tree.leaves((x_ND, w, sizes_G))))
    x_ND, w, sizes_G = vary((x_ND, w, sizes_G), axes)
    outputs = math.prod(w.values.shape[1:-1])
    return x_ND, w, sizes_G, lambda rows: vary(jnp.zeros((rows, outputs), x_ND.dtype), axes)


def _matrix_rows(x_ND: jax.Array, w: Matrix, sizes_G: jax.Array, first: jax.Array | int) -> jax.Array:
    """One row after another. Rows of one group follow each other, so its weights come from the cache after the first."""
    x_ND, w, sizes_G, zeros = _varying(x_ND, w, sizes_G)
    ends_G = jnp.cumsum(sizes_G)

    def row(i: jax.Array, y: jax.Array) -> jax.Array:
        group = jnp.sum(ends_G <= i) + first
        x = lax.dynamic_slice_in_dim(x_ND, i, 1)
        return lax.dynamic_update_slice_in_dim(y, apply(x, _one(w, group)).reshape(1, -1), i, 0)

    return lax.fori_loop(0, ends_G[-1], row, zeros(x_ND.shape[0]))


def _matrix_ragged(x_ND: jax.Array, w: Matrix, sizes_G: jax.Array, first: jax.Array | int) -> jax.Array:
    """`lax.ragged_dot` over the groups' matrices, dequantised all at once."""
    x_ND, w, sizes_G, _ = _varying(x_ND, w, sizes_G)
    groups = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, sizes_G.shape[0]), w)
    dense = dequantize(groups, x_ND.dtype)
    w_GDF = jnp.swapaxes(dense.reshape(dense.shape[0], -1, dense.shape[-1]), 1, 2)
    return _mask_tail(_ragged(x_ND, w_GDF, sizes_G), sizes_G)


def _matrix_tiles(x_ND: jax.Array, w: Matrix, sizes_G: jax.Array, first: jax.Array | int) -> jax.Array:
    """The tiled walk of `_rows_times_matrix`, dequantising one group's matrix at a time."""
    x_ND, w, sizes_G, zeros = _varying(x_ND, w, sizes_G)
    starts_G = jnp.cumsum(sizes_G) - sizes_G
    tile_rows = SMALL_TILE if x_ND.shape[0] <= SMALL_TILE * sizes_G.shape[0] else TILE
    padded = _pad_rows(x_ND, tile_rows)

    def group(g: jax.Array, y: jax.Array) -> jax.Array:
        weights = Matrix(dequantize(_one(w, g + first), x_ND.dtype))

        def tile(i: jax.Array, y: jax.Array) -> jax.Array:
            row = starts_G[g] + i * tile_rows
            product = apply(lax.dynamic_slice_in_dim(padded, row, tile_rows), weights)
            return lax.dynamic_update_slice_in_dim(y, product.reshape(tile_rows, -1), row, 0)

        return lax.fori_loop(0, (sizes_G[g] + tile_rows - 1) // tile_rows, tile, y)

    y = lax.fori_loop(0, sizes_G.shape[0], group, zeros(padded.shape[0]))
    return _mask_tail(y[: x_ND.shape[0]], sizes_G)


def _mask_tail(y_NF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(y_NF.shape[0])[:, None] < jnp.sum(sizes_G), y_NF, jnp.zeros((), y_NF.dtype))


def _ragged(x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    return lax.ragged_dot(x_ND, w_GDF, sizes_G, preferred_element_type=jnp.float32).astype(x_ND.dtype)


def _reference(x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    ends_G = jnp.cumsum(sizes_G)
    row_N = jnp.arange(x_ND.shape[0])
    member_NG = (row_N[:, None] < ends_G) & (row_N[:, None] >= ends_G - sizes_G)
    y_NGF = jnp.einsum("nd,gdf->ngf", x_ND, w_GDF, preferred_element_type=jnp.float32)
    return jnp.einsum("ngf,ng->nf", y_NGF, member_NG.astype(jnp.float32)).astype(x_ND.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tiled(x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array, transposed: bool) -> jax.Array:
    return _rows_times_matrix(x_ND, w_GDF, sizes_G, transpose=transposed)


def _tiled_fwd(x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array, transposed: bool) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _tiled(x_ND, w_GDF, sizes_G, transposed), (x_ND, w_GDF, sizes_G)


def _tiled_bwd(transposed: bool, saved: tuple[jax.Array, ...], dy_NF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_ND, w_GDF, sizes_G = saved
    dx_ND = _rows_times_matrix(dy_NF, w_GDF, sizes_G, transpose=not transposed)
    left, right = (dy_NF, x_ND) if transposed else (x_ND, dy_NF)
    return dx_ND, _rows_outer(left, right, sizes_G).astype(w_GDF.dtype), None


_tiled.defvjp(_tiled_fwd, _tiled_bwd)


def _pad_rows(x_ND: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x_ND, ((0, rows), (0, 0)))


def _rows_times_matrix(x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array, *, transpose: bool) -> jax.Array:
    """y = x @ w[g], or x @ w[g].T. A group's last tile overruns into the next group's rows, which the next group overwrites."""
    starts_G = jnp.cumsum(sizes_G) - sizes_G
    contract = ((1,), (1 if transpose else 0,))
    padded = _pad_rows(x_ND, TILE)
    y = vary(jnp.zeros((padded.shape[0], w_GDF.shape[1 if transpose else 2]), x_ND.dtype), vma(x_ND))

    def group(g: jax.Array, y: jax.Array) -> jax.Array:
        w = lax.dynamic_index_in_dim(w_GDF, g, keepdims=False)

        def tile(i: jax.Array, y: jax.Array) -> jax.Array:
            row = starts_G[g] + i * TILE
            rows = lax.dynamic_slice_in_dim(padded, row, TILE)
            product = lax.dot_general(rows, w, (contract, ((), ())), preferred_element_type=jnp.float32)
            return lax.dynamic_update_slice_in_dim(y, product.astype(y.dtype), row, 0)

        return lax.fori_loop(0, (sizes_G[g] + TILE - 1) // TILE, tile, y)

    y = lax.fori_loop(0, w_GDF.shape[0], group, y)
    return _mask_tail(y[: x_ND.shape[0]], sizes_G)


def _rows_outer(x_ND: jax.Array, dy_NF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """dw[g] = x_g.T @ dy_g, [G, D, F] in f32: rows of a tile that belong to the next group are masked out of dy."""
    starts_G = jnp.cumsum(sizes_G) - sizes_G
    padded_x, padded_dy = _pad_rows(x_ND, TILE_GRAD), _pad_rows(dy_NF, TILE_GRAD)
    zero = vary(jnp.zeros((x_ND.shape[1], dy_NF.shape[1]), jnp.float32), vma(x_ND))

    def group(g: jax.Array) -> jax.Array:
        def tile(i: jax.Array, dw: jax.Array) -> jax.Array:
            row = starts_G[g] + i * TILE_GRAD
            inside = jnp.arange(TILE_GRAD)[:, None] < sizes_G[g] - i * TILE_GRAD
            rows = lax.dynamic_slice_in_dim(padded_x, row, TILE_GRAD)
            grads = jnp.where(inside, lax.dynamic_slice_in_dim(padded_dy, row, TILE_GRAD), 0)
            return dw + lax.dot_general(rows, grads, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        return lax.fori_loop(0, (sizes_G[g] + TILE_GRAD - 1) // TILE_GRAD, tile, zero)

    return lax.map(group, jnp.arange(sizes_G.shape[0]))
