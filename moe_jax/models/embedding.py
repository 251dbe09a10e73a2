"""Looking tokens up in a sharded table."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.parallel.collectives import all_gather, psum, vary
from moe_jax.parallel.half_bits import are_bits, as_floats
from moe_jax.parallel.sharding import axes_of
from moe_jax.utils.annotations import Array, Float, Int


def embed(table: nnx.Param, tokens_BS: Int[Array, "B S"], dtype: Any) -> Float[Array, "B S D"]:
    """Looks tokens up in a table [D, V] whose vocabulary is sharded and whose width may be
    FSDP-sharded.

    The table is not gathered: every device looks all tokens up in the widths that it holds, and an
    all_to_all swaps tokens for widths, so T x D values travel where the table has V x D. Without
    FSDP, as in inference, all devices hold the same tokens and one gather brings each token's row
    from the device that has it.
    """
    table_DV = table.get_value()
    if not are_bits(table_DV):
        table_DV = table_DV.astype(dtype)
    split, axes = axes_of(table, "vocab"), axes_of(table, "width")
    columns = table_DV.shape[1]
    ids_N = all_gather(tokens_BS.reshape(-1), axes, 0) if axes else tokens_BS.reshape(-1)
    if split and lax.axis_size(split) > 1:
        owned_N = ids_N - lax.axis_index(split) * columns
        inside_N = (owned_N >= 0) & (owned_N < columns)
        columns_N = jnp.where(inside_N, owned_N, columns)
        x_ND = as_floats(table_DV.at[:, columns_N].get(mode="fill", fill_value=0)).T.astype(dtype)
    else:  # all ids are here: their gradient needs no scatter that drops what is out of bounds
        x_ND = as_floats(table_DV.at[:, ids_N].get(mode="clip")).T.astype(dtype)
        x_ND = vary(x_ND, split)
    if axes:
        if lax.axis_size(axes) > 1:
            x_ND = lax.all_to_all(x_ND, axes, split_axis=0, concat_axis=1, tiled=True)
        return psum(x_ND.reshape(*tokens_BS.shape, -1), "tensor")
    if split and lax.axis_size(split) > 1:
        x_RND = lax.all_gather(x_ND, split, to="invarying")
        x_ND = jnp.take_along_axis(x_RND, (ids_N // columns)[None, :, None], axis=0)[0]
    else:
        x_ND = psum(x_ND, split)
    return x_ND.reshape(*tokens_BS.shape, -1)
