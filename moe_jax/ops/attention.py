"""Causal attention within documents, with grouped heads and an optional sliding window.

Back ends: `reference` writes all scores out (for tests); `blockwise` walks blocks of queries, keeps one
block's scores at a time, skips blocks that the causal or window mask empties, and recomputes scores in a
hand-written backward pass (as in FlashAttention, Dao et al., 2022), on any platform; `cudnn` is cuDNN's
fused kernel for half precision on GPU. `auto` takes `cudnn` where it applies and `blockwise` elsewhere.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.annotations import Array, Float, Int
from moe_jax.spmd import vary_alike

Impl = Literal["auto", "reference", "blockwise", "cudnn"]

MASKED = -1e30  # finite, so that a row that sees nothing gives numbers, not NaN
MIN_BLOCK = 128
MAX_BLOCKS = 8  # blocks are unrolled: more would make compile time grow with the length


def attention(
    q_BSHQ: Float[Array, "B S H Q"],
    k_BSGQ: Float[Array, "B S G Q"],
    v_BSGQ: Float[Array, "B S G Q"],
    segments_BS: Int[Array, "B S"],
    *,
    window: int | None = None,
    impl: Impl = "auto",
) -> Float[Array, "B S H Q"]:
    """Softmax attention of each query over earlier keys (itself included) of the same segment.

    H is a multiple of G: query head h reads key head h // (H/G). Scores are scaled by Q**-0.5 and kept in
    f32. `window` limits how many tokens back a query sees, itself included. The result has q's dtype.
    Raises ValueError for an unknown `impl`.
    """
    if impl == "auto":
        half = q_BSHQ.dtype in (jnp.bfloat16, jnp.float16)
        impl = "cudnn" if half and jax.default_backend() == "gpu" else "blockwise"
    q_BSHQ, k_BSGQ, v_BSGQ, segments_BS = vary_alike(q_BSHQ, k_BSGQ, v_BSGQ, segments_BS)
    if impl == "blockwise":
        return _blockwise(q_BSHQ, k_BSGQ, v_BSGQ, segments_BS, window)
    mask_BSS = visible(segments_BS, 0, segments_BS.shape[1], 0, segments_BS.shape[1], window)
    if impl == "cudnn":
        return jax.nn.dot_product_attention(q_BSHQ, k_BSGQ, v_BSGQ, mask=mask_BSS[:, None], implementation="cudnn")
    if impl == "reference":
        return _reference(q_BSHQ, k_BSGQ, v_BSGQ, mask_BSS)
    raise ValueError(f"impl={impl!r} is not a back end of attention: use auto, reference, blockwise or cudnn")


def visible(segments_BS: jax.Array, q_start: int, q_stop: int, k_start: int, k_stop: int, window: int | None) -> jax.Array:
    """Which keys a query may see, bool [B, q, k], for static ranges of queries and keys."""
    back = np.arange(q_start, q_stop)[:, None] - np.arange(k_start, k_stop)[None, :]
    near = (back >= 0) if window is None else (back >= 0) & (back < window)
    same = segments_BS[:, q_start:q_stop, None] == segments_BS[:, None, k_start:k_stop]
    return same & jnp.asarray(near)


def _reference(q_BSHQ: jax.Array, k_BSGQ: jax.Array, v_BSGQ: jax.Array, mask_BSS: jax.Array) -> jax.Array:
    repeats = q_BSHQ.shape[2] // k_BSGQ.shape[2]
    k_BSHQ, v_BSHQ = (jnp.repeat(x, repeats, axis=2) for x in (k_BSGQ, v_BSGQ))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q_BSHQ, k_BSHQ, preferred_element_type=jnp.float32) * q_BSHQ.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask_BSS[:, None], scores, MASKED), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v_BSHQ.dtype), v_BSHQ, preferred_element_type=jnp.float32).astype(q_BSHQ.dtype)


def _blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(query start, query stop, first key) of each block of queries; its keys end where its queries do."""
    block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    starts = range(0, length, block)
    return [(start, min(start + block, length), 0 if window is None else max(0, start - window + 1)) for start in starts]


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Masked scaled scores [B, G, H/G, q, k] in f32 of queries [B, q, G, H/G, Q] and keys [B, k, G, Q]."""
    scores = jnp.einsum("bqghd,bkgd->bghqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.where(mask[:, None, None], scores, MASKED)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q_BSHQ: jax.Array, k_BSGQ: jax.Array, v_BSGQ: jax.Array, segments_BS: jax.Array, window: int | None) -> jax.Array:
    return _blockwise_fwd(q_BSHQ, k_BSGQ, v_BSGQ, segments_BS, window)[0]


def _split_heads(x_BSHQ: jax.Array, groups: int) -> jax.Array:
    batch, length, heads, width = x_BSHQ.shape
    return x_BSHQ.reshape(batch, length, groups, heads // groups, width)


def _blockwise_fwd(q_BSHQ: jax.Array, k_BSGQ: jax.Array, v_BSGQ: jax.Array, segments_BS: jax.Array, window: int | None):
    q = _split_heads(q_BSHQ, k_BSGQ.shape[2])
    outs, sums = [], []
    for start, stop, first in _blocks(q.shape[1], window):
        scores = _scores(q[:, start:stop], k_BSGQ[:, first:stop], visible(segments_BS, start, stop, first, stop, window))
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum("bghqk,bkgd->bghqd", weights.astype(v_BSGQ.dtype), v_BSGQ[:, first:stop], preferred_element_type=jnp.float32)
        outs.append(jnp.moveaxis(out / total, 3, 1).astype(q_BSHQ.dtype))
        sums.append((top + jnp.log(total))[..., 0])
    out_BSHQ = jnp.concatenate(outs, axis=1).reshape(q_BSHQ.shape)
    return out_BSHQ, (q_BSHQ, k_BSGQ, v_BSGQ, segments_BS, out_BSHQ, jnp.concatenate(sums, axis=-1))


def _blockwise_bwd(window: int | None, saved, dout_BSHQ: jax.Array):
    q_BSHQ, k_BSGQ, v_BSGQ, segments_BS, out_BSHQ, logsum_BGHS = saved
    groups = k_BSGQ.shape[2]
    q, dout = _split_heads(q_BSHQ, groups), _split_heads(dout_BSHQ, groups)
    # sum_k p * dp, the term that the softmax's normalisation subtracts, is out . dout for each query.
    inner = jnp.einsum("bqghd,bqghd->bghq", _split_heads(out_BSHQ, groups), dout, preferred_element_type=jnp.float32)
    dk, dv = jnp.zeros_like(k_BSGQ, jnp.float32), jnp.zeros_like(v_BSGQ, jnp.float32)
    dqs = []
    for start, stop, first in _blocks(q.shape[1], window):
        keys, values, queries, douts = k_BSGQ[:, first:stop], v_BSGQ[:, first:stop], q[:, start:stop], dout[:, start:stop]
        scores = _scores(queries, keys, visible(segments_BS, start, stop, first, stop, window))
        weights = jnp.exp(scores - logsum_BGHS[..., start:stop, None])
        dweights = jnp.einsum("bqghd,bkgd->bghqk", douts, values, preferred_element_type=jnp.float32)
        dscores = weights * (dweights - inner[..., start:stop, None]) * q.shape[-1] ** -0.5
        dscores, weights = dscores.astype(q.dtype), weights.astype(q.dtype)
        dqs.append(jnp.einsum("bghqk,bkgd->bqghd", dscores, keys, preferred_element_type=jnp.float32).astype(q.dtype))
        dk = dk.at[:, first:stop].add(jnp.einsum("bghqk,bqghd->bkgd", dscores, queries, preferred_element_type=jnp.float32))
        dv = dv.at[:, first:stop].add(jnp.einsum("bghqk,bqghd->bkgd", weights, douts, preferred_element_type=jnp.float32))
    dq_BSHQ = jnp.concatenate(dqs, axis=1).reshape(q_BSHQ.shape)
    return dq_BSHQ, dk.astype(k_BSGQ.dtype), dv.astype(v_BSGQ.dtype), None


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)
