"""Attention block by block, in XLA alone, with a hand-written backward pass."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from moe_jax.ops.attention.reference import MASKED, split_heads, visible
from moe_jax.ops.products import einsum_f32

MIN_BLOCK = 128

MAX_BLOCKS = 8  # blocks are unrolled: more would make compile time grow with the length


def _blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(query start, query stop, first key) of each block of queries; its keys end where its queries
    do.
    """
    block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    starts = range(0, length, block)
    return [
        (start, min(start + block, length), 0 if window is None else max(0, start - window + 1))
        for start in starts
    ]


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """Masked scaled scores [B, G, H/G, q, k] in f32 of queries [B, q, G, H/G, Q] and keys [B, k, G,
    Q].
    """
    scores = einsum_f32("bqghd,bkgd->bghqk", q, k) * scale
    return jnp.where(mask[:, None, None], scores, MASKED)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def blockwise_attention(
    q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, window: int | None, scale: float
) -> jax.Array:
    """`attention` with sinks f32 [H]; one block of scores is in memory at a time."""
    return _blockwise_fwd(q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, window, scale)[0]


def _blockwise_fwd(q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, window: int | None, scale: float):
    q, sinks = split_heads(q_BSHQ, k_BSGQ.shape[2]), sinks_H.reshape(k_BSGQ.shape[2], -1, 1, 1)
    outs, sums = [], []
    for start, stop, first in _blocks(q.shape[1], window):
        scores = _scores(
            q[:, start:stop],
            k_BSGQ[:, first:stop],
            visible(segments_BS, start, stop, first, stop, window),
            scale,
        )
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - top)
        values = v_BSGU[:, first:stop]
        out = einsum_f32("bghqk,bkgd->bghqd", weights.astype(values.dtype), values)
        outs.append(jnp.moveaxis(out / total, 3, 1).astype(q_BSHQ.dtype))
        sums.append((top + jnp.log(total))[..., 0])
    out_BSHU = jnp.concatenate(outs, axis=1).reshape(*q_BSHQ.shape[:3], -1)
    return out_BSHU, (
        q_BSHQ,
        k_BSGQ,
        v_BSGU,
        sinks_H,
        segments_BS,
        out_BSHU,
        jnp.concatenate(sums, axis=-1),
    )


def _blockwise_bwd(window: int | None, scale: float, saved, dout_BSHU: jax.Array):
    q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, out_BSHU, logsum_BGHS = saved
    groups = k_BSGQ.shape[2]
    q, dout = split_heads(q_BSHQ, groups), split_heads(dout_BSHU, groups)
    # sum_k p * dp, the term that the softmax's normalisation subtracts, is out . dout for each
    # query.
    inner = einsum_f32("bqghd,bqghd->bghq", split_heads(out_BSHU, groups), dout)
    dk, dv = jnp.zeros_like(k_BSGQ, jnp.float32), jnp.zeros_like(v_BSGU, jnp.float32)
    dqs = []
    for start, stop, first in _blocks(q.shape[1], window):
        keys, values, queries, douts = (
            k_BSGQ[:, first:stop],
            v_BSGU[:, first:stop],
            q[:, start:stop],
            dout[:, start:stop],
        )
        scores = _scores(
            queries, keys, visible(segments_BS, start, stop, first, stop, window), scale
        )
        weights = jnp.exp(scores - logsum_BGHS[..., start:stop, None])
        dweights = einsum_f32("bqghd,bkgd->bghqk", douts, values)
        dscores = weights * (dweights - inner[..., start:stop, None]) * scale
        dscores, weights = dscores.astype(q.dtype), weights.astype(q.dtype)
        dqs.append(einsum_f32("bghqk,bkgd->bqghd", dscores, keys).astype(q.dtype))
        to_keys = partial(einsum_f32, "bghqk,bqghd->bkgd")
        dk = _add_keys(dk, to_keys(dscores, queries), first, stop)
        dv = _add_keys(dv, to_keys(weights, douts), first, stop)
    dq_BSHQ = jnp.concatenate(dqs, axis=1).reshape(q_BSHQ.shape)
    # A sink's value is zero, so only the normalisation's term is left of its gradient.
    dsinks_H = -jnp.sum(
        jnp.exp(sinks_H.reshape(groups, -1, 1) - logsum_BGHS) * inner, axis=(0, 3)
    ).reshape(-1)
    return dq_BSHQ, dk.astype(k_BSGQ.dtype), dv.astype(v_BSGU.dtype), dsinks_H, None


def _add_keys(total: jax.Array, part: jax.Array, first: int, stop: int) -> jax.Array:
    """The sum [B, S, G, ...] with a part for the keys from `first` to `stop` added.

    All of the keys are added without `.at`, which makes a scatter without indices of them: in a
    `shard_map` over several devices the compiler of jaxlib 0.11.2 for CPU ends in a segmentation
    fault on it (docs/log.md).
    """
    if (first, stop) == (0, total.shape[1]):
        return total + part
    return total.at[:, first:stop].add(part)


blockwise_attention.defvjp(_blockwise_fwd, _blockwise_bwd)
