"""Every row times every matrix, one of them selected: what every back end must equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mask_tail(y_NF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """The rows [N, F] of all groups, zeros beyond the last one."""
    return jnp.where(
        jnp.arange(y_NF.shape[0])[:, None] < jnp.sum(sizes_G), y_NF, jnp.zeros((), y_NF.dtype)
    )


def group_of(place_N: jax.Array, ends_G: jax.Array) -> jax.Array:
    """The group in which each place lies, int32 [N]; the last one for places behind all.

    Not by `jnp.repeat`, which scatters out of bounds where the last groups are empty.
    """
    group_N = jnp.sum(place_N[:, None] >= ends_G, axis=1, dtype=jnp.int32)
    return jnp.minimum(group_N, ends_G.shape[0] - 1)


def reference_grouped_matmul(x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """`grouped_matmul` of x [N, D] and w [G, D, F]; N x G x F products are in memory."""
    ends_G = jnp.cumsum(sizes_G)
    row_N = jnp.arange(x_ND.shape[0])
    member_NG = (row_N[:, None] < ends_G) & (row_N[:, None] >= ends_G - sizes_G)
    y_NGF = jnp.einsum("nd,gdf->ngf", x_ND, w_GDF, preferred_element_type=jnp.float32)
    return jnp.einsum("ngf,ng->nf", y_NGF, member_NG.astype(jnp.float32)).astype(x_ND.dtype)
