"""`lax.ragged_dot`, fast on TPU; on CPU a masked dense product over every group."""

from __future__ import annotations

import jax
from jax import lax

from moe_jax.ops.grouped_matmul.reference import mask_tail


def kernel(x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """The product as the platform has it: on TPU, rows beyond the last group hold anything.

    In half precision it accumulates in f32 by itself. To ask for an f32 result and to round that
    would keep an f32 copy of all rows, in the backward pass too.
    """
    return lax.ragged_dot(x_ND, w_GDF, sizes_G, preferred_element_type=x_ND.dtype)


@jax.custom_vjp
def ragged(x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """`grouped_matmul` of x [N, D] and w [G, D, F]."""
    return mask_tail(kernel(x_ND, w_GDF, sizes_G), sizes_G)


def _ragged_fwd(x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array):
    return ragged(x_ND, w_GDF, sizes_G), (x_ND, w_GDF, sizes_G)


def _ragged_bwd(saved: tuple[jax.Array, ...], dy_NF: jax.Array):
    x_ND, w_GDF, sizes_G = saved
    _, pull = jax.vjp(lambda x, w: kernel(x, w, sizes_G), x_ND, w_GDF)
    dx_ND, dw_GDF = pull(dy_NF)
    return mask_tail(dx_ND, sizes_G), dw_GDF, None


ragged.defvjp(_ragged_fwd, _ragged_bwd)
