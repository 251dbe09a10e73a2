"""Grouped matmul: rows sorted by group, each group multiplied by its own matrix.

Back ends: `reference` multiplies every row by every matrix and selects (for tests); `ragged` is
`lax.ragged_dot`, right on GPU and TPU, but a masked dense product over every group on CPU; `tiled`
walks each group in tiles of rows with plain matmuls, fast on CPU; `rows`, for a `PackedWeight`
alone, takes one row after another, for the few rows of decoding, where reading weights takes all
the time, and `short` a few of a group at once. `counted` is `tiled` with a loop of fixed length,
and `chosen`, for a `PackedWeight` alone, gives each row a copy of its matrix: for platforms where a
loop of open length is slow. `auto` takes `rows` for a `PackedWeight` and few rows (`short` where
they are several per group and the weights bf16 on a CPU), else `ragged` on GPU and TPU and `tiled`
elsewhere and for a `PackedWeight` on TPU, but `chosen` and `counted` on Metal.
Measurements behind the tile sizes are in docs/benchmarks.md and docs/log.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.grouped_matmul.counted import (
    CHOSEN_ROWS,
    counted,
    packed_chosen,
    packed_counted,
)
from moe_jax.ops.grouped_matmul.packed import (
    FEW_ROWS,
    packed_ragged,
    packed_rows,
    packed_short,
    packed_tiles,
)
from moe_jax.ops.grouped_matmul.ragged import ragged
from moe_jax.ops.grouped_matmul.reference import reference_grouped_matmul
from moe_jax.ops.grouped_matmul.tiled import tiled
from moe_jax.ops.quantized import PackedWeight
from moe_jax.parallel.collectives import vary_alike
from moe_jax.parallel.half_bits import are_bits
from moe_jax.runtime.platform import default_platform
from moe_jax.utils.annotations import Array, Float, Int

BackEnd = Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]
GroupedMatmulImpl = (
    Literal["auto", "reference", "ragged", "tiled", "rows", "short", "counted", "chosen"] | BackEnd
)


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
    if impl == "auto":
        impl = _suitable(x_ND.shape[0], w_GDF, sizes_G.shape[0])
    if isinstance(w_GDF, PackedWeight):
        back_end = _PACKED.get(impl) if isinstance(impl, str) else None
        if back_end is None:
            raise _unknown(impl)
        return back_end(x_ND, w_GDF, sizes_G, first)
    x_ND, w_GDF, sizes_G = vary_alike(x_ND, w_GDF.astype(x_ND.dtype), sizes_G)
    if w_GDF.shape[0] != sizes_G.shape[0]:
        w_GDF = lax.dynamic_slice_in_dim(w_GDF, first, sizes_G.shape[0])
    if callable(impl):
        return impl(x_ND, w_GDF, sizes_G, transposed)
    if impl == "tiled":
        return tiled(x_ND, w_GDF, sizes_G, transposed)
    if impl == "counted":
        return counted(x_ND, w_GDF, sizes_G, transposed)
    w_GDF = jnp.swapaxes(w_GDF, 1, 2) if transposed else w_GDF
    if impl == "reference":
        return reference_grouped_matmul(x_ND, w_GDF, sizes_G)
    if impl == "ragged":
        return ragged(x_ND, w_GDF, sizes_G)
    raise _unknown(impl)


# Rows per group from which bf16 is quicker in tiles than row by row (docs/log.md).
ROWS_TOGETHER = 3

_PACKED = {
    "rows": packed_rows,
    "short": packed_short,
    "ragged": packed_ragged,
    "tiled": packed_tiles,
    "reference": packed_tiles,
    "counted": packed_counted,
    "chosen": packed_chosen,
}


def _suitable(rows: int, w: Any, groups: int) -> Any:
    """The back end for this platform."""
    platform, packed = default_platform(), isinstance(w, PackedWeight)
    if not platform.open_loops:
        return "chosen" if packed and rows <= CHOSEN_ROWS else "counted"
    if packed and rows <= FEW_ROWS:
        together = are_bits(w.values) and rows >= ROWS_TOGETHER * groups
        return "short" if together else "rows"
    walks = packed and platform.packed_tile is not None
    return "ragged" if platform.ragged_dot and not walks else "tiled"


def _unknown(impl: object) -> ValueError:
    return ValueError(
        f"impl={impl!r} is not a back end of grouped_matmul: use auto, reference, ragged, tiled or "
        f"counted (rows, short and chosen need a PackedWeight)"
    )
