"""Output head and cross-entropy in one: the logits of a few hundred tokens at a time, never of all.

The forward pass already makes the gradients of a chunk while its logits are at hand, so that the
backward pass recomputes nothing and the [T, V] logits are never kept (the idea of Cut
Cross-Entropy, Wijmans et al., 2024, without its filtering). The vocabulary may be sharded over mesh
axes, and along some of them each device may have tokens of its own: then each chunk of tokens is
gathered, and nobody needs the whole head.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.loops import map_over, scan
from moe_jax.ops.products import dot, dot_bits, einsum_f32
from moe_jax.parallel.collectives import (
    all_gather,
    pmax,
    psum,
    rank,
    reduce_scatter,
    vary,
    vary_alike,
    vma,
)
from moe_jax.parallel.half_bits import are_bits
from moe_jax.utils.annotations import Array, Float, Int, Shaped

CrossEntropyImpl = Literal["chunked", "reference"]
Axis = str | tuple[str, ...] | None

# Tokens of a chunk; each re-reads the gradient of the head, so small chunks cost bandwidth.
CHUNK = 1024
# Logits of a chunk (f32) above which fewer of a device's tokens are taken, as long as those of all
# devices together are still CHUNK.
LOGITS = 1 << 26


class VocabularySplit(NamedTuple):
    """How the vocabulary is split over the devices."""

    axes: tuple[str, ...] = ()  # mesh axes along which all devices have the same tokens
    token_axes: tuple[str, ...] = ()  # and those along which each has its own, within `axes`
    columns: int = 0  # the vocabulary, or what one device along `axes` has of it

    @property
    def all(self) -> tuple[str, ...]:
        """Every axis that splits the vocabulary."""
        return (*self.axes, *self.token_axes)

    @property
    def ranks(self) -> int:
        """Devices with tokens of their own."""
        return lax.axis_size(self.token_axes) if self.token_axes else 1

    def start(self, held: int) -> tuple[jax.Array | int, jax.Array | int]:
        """The number of the first of this device's `held` columns, and how many of them there
        are: the last devices may hold padding.
        """
        before = rank(self.axes) * self.columns if self.axes else 0
        within = rank(self.token_axes) * held if self.token_axes else 0
        padded = held * self.ranks != self.columns
        return before + within, jnp.clip(self.columns - within, 0, held) if padded else held


def linear_cross_entropy(
    h_TD: Float[Array, "T D"],
    w_DV: Shaped[Array, "D V"],
    target_T: Int[Array, " T"],
    weight_T: Float[Array, " T"],
    *,
    axis: Axis = None,
    token_axes: tuple[str, ...] = (),
    columns: int | None = None,
    impl: CrossEntropyImpl = "chunked",
) -> Float[Array, ""]:
    """Weighted sum over tokens of the negative log-likelihood (nats, f32) of `target_T` under
    softmax(h @ w).

    With `axis`, `w_DV` is this device's block of columns of a vocabulary sharded over that mesh
    axis (or axes), `target_T` still numbers the whole vocabulary, and the result is the same on all
    devices of the axis. With `token_axes`, the block is split further over these, where each device
    has other tokens: the result is the sum over the tokens of all of them. `columns` is then the
    size of the block before that split, if the last devices' parts are padded. `weight_T` gets no
    gradient, and no array does where `w_DV` are bits (parallel/half_bits.py). Raises ValueError for
    an unknown `impl`.
    """
    axes = () if axis is None else (axis,) if isinstance(axis, str) else axis
    split = VocabularySplit(axes, token_axes, 0)
    split = split._replace(columns=columns or w_DV.shape[1] * split.ranks)
    h_TD = vary(h_TD, split.all)  # its transpose sums the blocks' gradients
    w_DV = w_DV if are_bits(w_DV) else w_DV.astype(h_TD.dtype)
    h_TD, w_DV, _ = vary_alike(h_TD, w_DV, target_T)
    if impl == "reference":
        h_TD = all_gather(h_TD, token_axes, 0) if token_axes else h_TD
        target_T, weight_T = (_gathered(x_T[None], split)[0] for x_T in (target_T, weight_T))
        return jnp.sum(weight_T * _loss_T(h_TD, w_DV, target_T, split)[0])
    if impl == "chunked":
        size = _chunk(w_DV.shape[1], split.ranks)
        target_CT, weight_CT = (_gathered(_split(x_T, size), split) for x_T in (target_T, weight_T))
        return _chunked(h_TD, w_DV, target_CT, weight_CT, split)
    raise ValueError(
        f"impl={impl!r} is not a back end of linear_cross_entropy: use chunked or reference"
    )


def logits(h_TD: Float[Array, "T D"], w_DV: Shaped[Array, "D V"]) -> Float[Array, "T V"]:
    """Logits in f32 of this device's block of the vocabulary."""
    if are_bits(w_DV):
        return dot_bits(h_TD, w_DV)
    return dot(h_TD, w_DV.astype(h_TD.dtype), ((1,), (0,)))


def _loss_T(
    h_TD: jax.Array, w_DV: jax.Array, target_T: jax.Array, split: VocabularySplit
) -> tuple[jax.Array, ...]:
    """Loss of each token, and what its gradient needs: exp(logits - top), their sum, the local
    target index (-1 where another device has it).
    """
    logits_TV = logits(h_TD, w_DV)
    start, held = split.start(w_DV.shape[1])
    if not isinstance(held, int):
        logits_TV = jnp.where(jnp.arange(w_DV.shape[1]) < held, logits_TV, -jnp.inf)
    top_T = lax.stop_gradient(jnp.max(logits_TV, axis=-1))
    top_T = pmax(top_T, split.all)
    local_T = target_T - start
    local_T = jnp.where((local_T >= 0) & (local_T < held), local_T, -1)
    exp_TV = jnp.exp(logits_TV - top_T[:, None])
    sum_T = jnp.sum(exp_TV, axis=-1)
    hit_T = jnp.take_along_axis(logits_TV, jnp.maximum(local_T, 0)[:, None], axis=-1)[:, 0]
    hit_T = jnp.where(local_T >= 0, hit_T, 0.0)
    sum_T, hit_T = psum((sum_T, hit_T), split.all)
    return top_T + jnp.log(sum_T) - hit_T, exp_TV, sum_T, local_T


def _chunk(held: int, ranks: int) -> int:
    """This device's tokens of a chunk, where `ranks` devices put theirs together for `held` columns
    each.
    """
    fitting = max(LOGITS // (held * ranks), 1)
    return min(CHUNK, max(1 << fitting.bit_length() - 1, CHUNK // ranks, 1))


def _split(x_T: jax.Array, size: int) -> jax.Array:
    """Reshapes the leading dimension to [chunks, at most `size` tokens of a chunk], zero-padded."""
    chunks = -(-x_T.shape[0] // size)
    size = -(-x_T.shape[0] // chunks)
    padding = [(0, chunks * size - x_T.shape[0])] + [(0, 0)] * (x_T.ndim - 1)
    return jnp.pad(x_T, padding).reshape(chunks, size, *x_T.shape[1:])


def _gathered(x_CT: jax.Array, split: VocabularySplit) -> jax.Array:
    """Chunks of the tokens of all devices that put theirs together, the same on all of them."""
    if not split.token_axes:
        return x_CT
    x_CRT = lax.all_gather(x_CT, split.token_axes, axis=1, to="invarying")
    return x_CRT.reshape(x_CT.shape[0], -1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(
    h_TD: jax.Array,
    w_DV: jax.Array,
    target_CT: jax.Array,
    weight_CT: jax.Array,
    split: VocabularySplit,
) -> jax.Array:
    def chunk(x: tuple[jax.Array, ...]) -> jax.Array:
        h_TD, target_T, weight_T = x
        h_TD = all_gather(h_TD, split.token_axes, 0) if split.token_axes else h_TD
        return jnp.sum(weight_T * _loss_T(h_TD, w_DV, target_T, split)[0])

    size = target_CT.shape[1] // split.ranks
    return jnp.sum(map_over(chunk, (_split(h_TD, size), target_CT, weight_CT)))


def _chunked_fwd(
    h_TD: jax.Array,
    w_DV: jax.Array,
    target_CT: jax.Array,
    weight_CT: jax.Array,
    split: VocabularySplit,
):
    def chunk(dw_DV: jax.Array | None, x: tuple[jax.Array, ...]):
        h, target, weight = x
        h = all_gather(h, split.token_axes, 0) if split.token_axes else h
        loss_T, exp_TV, sum_T, local_T = _loss_T(h, w_DV, target, split)
        hit_TV = (jnp.arange(w_DV.shape[1]) == local_T[:, None]).astype(jnp.float32)
        dlogits_TV = ((exp_TV / sum_T[:, None] - hit_TV) * weight[:, None]).astype(h.dtype)
        dh = dot(dlogits_TV, w_DV, ((1,), (1,)), h.dtype)
        if split.token_axes:
            dh = reduce_scatter(dh, split.token_axes, 0)
        dw = einsum_f32("tv,td->dv", dlogits_TV, h)
        return (dw if dw_DV is None else dw_DV + dw), (jnp.sum(weight * loss_T), dh)

    chunks = (_split(h_TD, target_CT.shape[1] // split.ranks), target_CT, weight_CT)
    if chunks[0].shape[0] == 1:  # one chunk needs no zeroed accumulator
        dw_DV, (loss, dh) = chunk(None, tuple(x[0] for x in chunks))
    else:
        dw_DV, (losses, dh) = scan(
            chunk, vary(jnp.zeros(w_DV.shape, jnp.float32), vma(w_DV)), chunks
        )
        loss = jnp.sum(losses)
    return loss, (dh.reshape(-1, h_TD.shape[1])[: h_TD.shape[0]], dw_DV.astype(w_DV.dtype))


def _chunked_bwd(split: VocabularySplit, saved: tuple[jax.Array, jax.Array], dloss: jax.Array):
    dh_TD, dw_DV = ((d.astype(jnp.float32) * dloss).astype(d.dtype) for d in saved)
    return dh_TD, dw_DV, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
