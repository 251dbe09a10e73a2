"""Output head and cross-entropy in one: the logits of a few hundred tokens at a time, never of all.

The forward pass already makes the gradients of a chunk while its logits are at hand, so that the
backward pass recomputes nothing and the [T, V] logits are never kept (the idea of Cut
Cross-Entropy, Wijmans et al., 2024, without its filtering). The vocabulary may be sharded over a
mesh axis.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.loops import map_over, scan
from moe_jax.ops.products import dot, dot_bits, einsum_f32
from moe_jax.parallel.collectives import pmax, psum, rank, vary, vary_alike, vma
from moe_jax.parallel.half_bits import are_bits
from moe_jax.utils.annotations import Array, Float, Int, Shaped

CrossEntropyImpl = Literal["chunked", "reference"]
Axis = str | tuple[str, ...] | None

CHUNK = 1024  # tokens; each chunk re-reads the [D, V] gradient once, so small chunks cost bandwidth


def linear_cross_entropy(
    h_TD: Float[Array, "T D"],
    w_DV: Shaped[Array, "D V"],
    target_T: Int[Array, " T"],
    weight_T: Float[Array, " T"],
    *,
    axis: Axis = None,
    impl: CrossEntropyImpl = "chunked",
) -> Float[Array, ""]:
    """Weighted sum over tokens of the negative log-likelihood (nats, f32) of `target_T` under
    softmax(h @ w).

    With `axis`, `w_DV` is this device's block of columns of a vocabulary sharded over that mesh
    axis (or axes), `target_T` still numbers the whole vocabulary, and the result is the same on all
    devices of the axis. `weight_T` gets no gradient, and no array does where `w_DV` are bits
    (parallel/half_bits.py). Raises ValueError for an unknown `impl`.
    """
    if axis is not None:
        h_TD = vary(
            h_TD, (axis,) if isinstance(axis, str) else axis
        )  # its transpose sums the blocks' gradients
    w_DV = w_DV if are_bits(w_DV) else w_DV.astype(h_TD.dtype)
    h_TD, w_DV, _ = vary_alike(h_TD, w_DV, target_T)
    if impl == "reference":
        return jnp.sum(weight_T * _loss_T(h_TD, w_DV, target_T, axis)[0])
    if impl == "chunked":
        return _chunked(h_TD, w_DV, target_T, weight_T, axis)
    raise ValueError(
        f"impl={impl!r} is not a back end of linear_cross_entropy: use chunked or reference"
    )


def logits(h_TD: Float[Array, "T D"], w_DV: Shaped[Array, "D V"]) -> Float[Array, "T V"]:
    """Logits in f32 of this device's block of the vocabulary."""
    if are_bits(w_DV):
        return dot_bits(h_TD, w_DV)
    return dot(h_TD, w_DV.astype(h_TD.dtype), ((1,), (0,)))


def _loss_T(
    h_TD: jax.Array, w_DV: jax.Array, target_T: jax.Array, axis: Axis
) -> tuple[jax.Array, ...]:
    """Loss of each token, and what its gradient needs: exp(logits - top), their sum, the local
    target index.
    """
    logits_TV = logits(h_TD, w_DV)
    top_T = lax.stop_gradient(jnp.max(logits_TV, axis=-1))
    local_T = target_T
    if axis is not None:
        top_T = pmax(top_T, axis)
        local_T = target_T - rank(axis) * w_DV.shape[1]
    exp_TV = jnp.exp(logits_TV - top_T[:, None])
    sum_T = jnp.sum(exp_TV, axis=-1)
    hit_T = jnp.take_along_axis(logits_TV, local_T[:, None], axis=-1, mode="fill", fill_value=0.0)[
        :, 0
    ]
    hit_T = jnp.where((local_T >= 0) & (local_T < w_DV.shape[1]), hit_T, 0.0)
    if axis is not None:
        sum_T, hit_T = psum((sum_T, hit_T), axis)
    return top_T + jnp.log(sum_T) - hit_T, exp_TV, sum_T, local_T


def _split(x_T: jax.Array) -> jax.Array:
    """Reshapes the leading dimension to [chunks, tokens of a chunk], zero-padded."""
    chunks = -(-x_T.shape[0] // CHUNK)
    size = -(-x_T.shape[0] // chunks)
    padding = [(0, chunks * size - x_T.shape[0])] + [(0, 0)] * (x_T.ndim - 1)
    return jnp.pad(x_T, padding).reshape(chunks, size, *x_T.shape[1:])


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(
    h_TD: jax.Array, w_DV: jax.Array, target_T: jax.Array, weight_T: jax.Array, axis: Axis
) -> jax.Array:
    losses = map_over(
        lambda c: jnp.sum(c[2] * _loss_T(c[0], w_DV, c[1], axis)[0]),
        tuple(map(_split, (h_TD, target_T, weight_T))),
    )
    return jnp.sum(losses)


def _chunked_fwd(
    h_TD: jax.Array, w_DV: jax.Array, target_T: jax.Array, weight_T: jax.Array, axis: Axis
):
    def chunk(dw_DV: jax.Array | None, x: tuple[jax.Array, ...]):
        h, target, weight = x
        loss_T, exp_TV, sum_T, local_T = _loss_T(h, w_DV, target, axis)
        hit_TV = (jnp.arange(w_DV.shape[1]) == local_T[:, None]).astype(jnp.float32)
        dlogits_TV = ((exp_TV / sum_T[:, None] - hit_TV) * weight[:, None]).astype(h.dtype)
        dh = dot(dlogits_TV, w_DV, ((1,), (1,)), h.dtype)
        dw = einsum_f32("tv,td->dv", dlogits_TV, h)
        return (dw if dw_DV is None else dw_DV + dw), (jnp.sum(weight * loss_T), dh)

    chunks = tuple(map(_split, (h_TD, target_T, weight_T)))
    if chunks[0].shape[0] == 1:  # one chunk needs no zeroed accumulator
        dw_DV, (loss, dh) = chunk(None, tuple(x[0] for x in chunks))
    else:
        dw_DV, (losses, dh) = scan(
            chunk, vary(jnp.zeros(w_DV.shape, jnp.float32), vma(w_DV)), chunks
        )
        loss = jnp.sum(losses)
    return loss, (dh.reshape(-1, h_TD.shape[1])[: h_TD.shape[0]], dw_DV.astype(w_DV.dtype))


def _chunked_bwd(axis: Axis, saved: tuple[jax.Array, jax.Array], dloss: jax.Array):
    dh_TD, dw_DV = ((d.astype(jnp.float32) * dloss).astype(d.dtype) for d in saved)
    return dh_TD, dw_DV, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
