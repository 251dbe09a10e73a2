"""Grouped matmul: rows sorted by group, each group multiplied by its own matrix.

Back ends: `reference` multiplies every row by every matrix and selects (for tests); `ragged` is
`lax.ragged_dot`, right on GPU and TPU, but a masked dense product over every group on CPU; `tiled`
walks each group in tiles of rows with plain matmuls, fast on CPU; `rows`, for a `PackedWeight`
alone, takes one row after another, for the few rows of decoding, where reading weights takes all
the time. `auto` takes `rows` for a `PackedWeight` and few rows, else `ragged` on GPU and TPU and
`tiled` elsewhere.
Measurements behind the tile sizes are in docs/benchmarks.md and docs/log.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.grouped_matmul.packed import FEW_ROWS, packed_ragged, packed_rows, packed_tiles
from moe_jax.ops.grouped_matmul.ragged import ragged
from moe_jax.ops.grouped_matmul.reference import mask_tail, reference_grouped_matmul
from moe_jax.ops.grouped_matmul.tiled import tiled
from moe_jax.ops.quantized import PackedWeight
from moe_jax.parallel.collectives import vary_alike
from moe_jax.runtime.platform import default_platform
from moe_jax.utils.annotations import Array, Float, Int

BackEnd = Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]
GroupedMatmulImpl = Literal["auto", "reference", "ragged", "tiled", "rows"] | BackEnd


def grouped_matmul(
    x_ND: Float[Array, "N D"],
    w_GDF: Float[Array, "G _ _"] | PackedWeight,
    sizes_G: Int[Array, " G2"],
    *,
    transposed: bool = False,
    first: jax.Array | int = 0,
    impl: GroupedMatmulImpl = "auto",
) -> Float[Array, "N F"]:
    """Multiplies consecutive runs of rows by their group's matrix.

    Rows of group g are the `sizes_G[g]` rows after those of the groups before it; rows beyond the
    last group give zeros. Groups of no rows get zero gradient. Group g's matrix is number first + g
    of `w_GDF`. With `transposed` the matrices are given as [G, F, D]; a `PackedWeight`
    [G, *outputs, D], for inference only, always is. Products accumulate in f32; the result has the
    dtype of `x_ND`.
    `impl` may be a function like `tiled` too. Raises ValueError for an unknown one.
    """
    accelerated = default_platform().ragged_dot
    if isinstance(w_GDF, PackedWeight):
        if impl == "rows" or (impl == "auto" and x_ND.shape[0] <= FEW_ROWS):
            return packed_rows(x_ND, w_GDF, sizes_G, first)
        if impl == "ragged" or (impl == "auto" and accelerated):
            return packed_ragged(x_ND, w_GDF, sizes_G, first)
        if impl not in ("auto", "tiled", "reference"):
            raise _unknown(impl)
        return packed_tiles(x_ND, w_GDF, sizes_G, first)
    if impl == "auto":
        impl = "ragged" if accelerated else "tiled"
    x_ND, w_GDF, sizes_G = vary_alike(x_ND, w_GDF.astype(x_ND.dtype), sizes_G)
    if w_GDF.shape[0] != sizes_G.shape[0]:
        w_GDF = lax.dynamic_slice_in_dim(w_GDF, first, sizes_G.shape[0])
    if callable(impl):
        return impl(x_ND, w_GDF, sizes_G, transposed)
    if impl == "tiled":
        return tiled(x_ND, w_GDF, sizes_G, transposed)
    w_GDF = jnp.swapaxes(w_GDF, 1, 2) if transposed else w_GDF
    if impl == "reference":
        return reference_grouped_matmul(x_ND, w_GDF, sizes_G)
    if impl == "ragged":
        return mask_tail(ragged(x_ND, w_GDF, sizes_G), sizes_G)
    raise _unknown(impl)


def _unknown(impl: object) -> ValueError:
    return ValueError(
        f"impl={impl!r} is not a back end of grouped_matmul: use auto, reference, ragged or tiled "
        f"(rows needs a PackedWeight)"
    )
