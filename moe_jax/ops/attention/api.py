"""Causal attention within documents, with grouped heads and an optional sliding window.

Back ends: `reference` writes all scores out (for tests); `blockwise` walks blocks of queries, keeps one
block's scores at a time, skips blocks that the causal or window mask empties, and recomputes scores in a
hand-written backward pass (as in FlashAttention, Dao et al., 2022), on any platform; `cudnn` is cuDNN's
fused kernel for half precision on GPU. `auto` takes `cudnn` where it applies and `blockwise` elsewhere.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.parallel.collectives import vary, vary_alike, vma
from moe_jax.utils.annotations import Array, Float, Int

Impl = Literal["auto", "reference", "blockwise", "cudnn"]

MASKED = -1e30  # finite, so that a row that sees nothing gives numbers, not NaN
MIN_BLOCK = 128
CACHE_BLOCK = 256  # places of a cache read at once
MAX_BLOCKS = 8  # blocks are unrolled: more would make compile time grow with the length


def attention(
    q_BSHQ: Float[Array, "B S H Q"],
    k_BSGQ: Float[Array, "B S G Q"],
    v_BSGU: Float[Array, "B S G U"],
    segments_BS: Int[Array, "B S"],
    *,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Float[Array, " H"] | None = None,
    impl: Impl = "auto",
) -> Float[Array, "B S H U"]:
    """Softmax attention of each query over earlier keys (itself included) of the same segment.

    H is a multiple of G: query head h reads key head h // (H/G). Scores are multiplied by `scale`, by default Q**-0.5,
    and kept in f32. `window` limits how many tokens back a query sees, itself included. `sinks_H` are scores of one more
    key a head, whose value is zero (gpt-oss, 2025). The result has q's dtype. Raises ValueError for an
    unknown `impl`, and where cudnn cannot do what is asked.
    """
    scale = q_BSHQ.shape[-1] ** -0.5 if scale is None else scale
    if impl == "auto":
        half = q_BSHQ.dtype in (jnp.bfloat16, jnp.float16)
        fused = half and jax.default_backend() == "gpu" and sinks_H is None and v_BSGU.shape[-1] == q_BSHQ.shape[-1]
        impl = "cudnn" if fused else "blockwise"
    if sinks_H is None and impl == "blockwise":  # a sink that takes nothing; it varies like the queries, below
        sinks_H = jnp.full(q_BSHQ.shape[2], MASKED, jnp.float32)
    q_BSHQ, k_BSGQ, v_BSGU, segments_BS = vary_alike(q_BSHQ, k_BSGQ, v_BSGU, segments_BS)
    if impl == "blockwise":
        assert sinks_H is not None
        return _blockwise(q_BSHQ, k_BSGQ, v_BSGU, vary(sinks_H.astype(jnp.float32), vma(q_BSHQ)), segments_BS, window, scale)
    mask_BSS = visible(segments_BS, 0, segments_BS.shape[1], 0, segments_BS.shape[1], window)
    if impl == "cudnn":
        if sinks_H is not None or v_BSGU.shape[-1] != q_BSHQ.shape[-1]:
            raise ValueError("impl='cudnn' knows neither sinks nor values of another width: use blockwise")
        return jax.nn.dot_product_attention(q_BSHQ, k_BSGQ, v_BSGU, mask=mask_BSS[:, None], scale=scale, implementation="cudnn")
    if impl == "reference":
        return _reference(q_BSHQ, k_BSGQ, v_BSGU, mask_BSS, scale, sinks_H)
    raise ValueError(f"impl={impl!r} is not a back end of attention: use auto, reference, blockwise or cudnn")


def visible(segments_BS: jax.Array, q_start: int, q_stop: int, k_start: int, k_stop: int, window: int | None) -> jax.Array:
    """Which keys a query may see, bool [B, q, k], for static ranges of queries and keys."""
    back = np.arange(q_start, q_stop)[:, None] - np.arange(k_start, k_stop)[None, :]
    near = (back >= 0) if window is None else (back >= 0) & (back < window)
    same = segments_BS[:, q_start:q_stop, None] == segments_BS[:, None, k_start:k_stop]
    return same & jnp.asarray(near)


def cached_attention(
    q_BSHQ: Float[Array, "B S H Q"],
    keys: Float[Array, "R B G Q M"],
    values: Float[Array, "R B G M U"] | None,
    layer: Int[Array, ""] | int,
    position_BS: Int[Array, "B S"],
    *,
    value_width: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H U"]:
    """`attention` over one layer of a cache whose place m holds the key and value of position m, for queries at any positions.

    A query sees the places up to its own position, so what lies beyond may be anything finite. Without `values` they are the
    first `value_width` entries of the keys, by default all. Only the blocks of places that some query may see are read, one after another,
    with a running softmax (Milakov and Gimelshein, 2018). Not differentiable.
    """
    scale = q_BSHQ.shape[-1] ** -0.5 if scale is None else scale
    arrays = (q_BSHQ, keys, position_BS) if values is None else (q_BSHQ, keys, position_BS, values)
    q_BSHQ, keys, position_BS, *rest = vary_alike(*arrays)
    batch, length, heads, _ = q_BSHQ.shape
    groups, _, places = keys.shape[2:]
    block = math.gcd(places, CACHE_BLOCK)
    width = values.shape[-1] if values is not None else value_width or keys.shape[3]
    q = q_BSHQ.reshape(batch, length, groups, -1, q_BSHQ.shape[-1])
    q = jnp.moveaxis(q, 1, 3).reshape(batch, groups, -1, q.shape[-1])  # rows: heads of the group, then positions
    position = jnp.tile(position_BS, (1, heads // groups))[:, None, :, None]

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = carry
        k = lax.dynamic_slice(keys, (layer, 0, 0, 0, i * block), (1, *keys.shape[1:4], block))[0].astype(q.dtype)
        if rest:
            v = lax.dynamic_slice(rest[0], (layer, 0, 0, i * block, 0), (1, batch, groups, block, width))[0].astype(q.dtype)
        else:
            v = jnp.swapaxes(k[:, :, :width], 2, 3)
        scores = jnp.einsum("bgrd,bgdm->bgrm", q, k, preferred_element_type=jnp.float32) * scale
        back = position - (i * block + jnp.arange(block))
        scores = jnp.where((back >= 0) if window is None else (back >= 0) & (back < window), scores, MASKED)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - higher[..., None])
        faded = total * jnp.exp(top - higher)
        whole = faded + jnp.sum(weights, axis=-1)
        part = jnp.einsum("bgrm,bgmd->bgrd", (weights / whole[..., None]).astype(v.dtype), v, preferred_element_type=jnp.float32)
        return higher, whole, (out.reshape(part.shape) * (faded / whole)[..., None] + part).reshape(-1)

    none = vary(jnp.zeros(q.shape[:3], jnp.float32), vma(q))
    top, total = none + MASKED, none
    if sinks_H is not None:  # as if the sink's key had been read before
        top, total = none + jnp.repeat(sinks_H.astype(jnp.float32).reshape(groups, -1), length, axis=1), none + 1
    first = 0 if window is None else jnp.maximum(jnp.min(position_BS) - window + 1, 0) // block
    blocks = jnp.minimum(jnp.max(position_BS), places - 1) // block + 1
    # Flat, and normalised all along: for one token XLA:CPU computes a reshape or division after the loop anew for each
    # output of the next product.
    out = vary(jnp.zeros(math.prod(q.shape[:3]) * width, jnp.float32), vma(q))
    *_, out = lax.fori_loop(first, blocks, step, (top, total, out))
    out = out.reshape(batch, groups, heads // groups, length, width)
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width).astype(q_BSHQ.dtype)


def _reference(
    q_BSHQ: jax.Array, k_BMGQ: jax.Array, v_BMGU: jax.Array, mask_BSM: jax.Array, scale: float, sinks_H: jax.Array | None
) -> jax.Array:
    """All scores at once; the mask says which of M keys each query sees."""
    q, groups = _split_heads(q_BSHQ, k_BMGQ.shape[2]), k_BMGQ.shape[2]
    scores = jnp.einsum("bsghd,bmgd->bghsm", q, k_BMGQ, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask_BSM[:, None, None], scores, MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if sinks_H is not None:
        sinks = sinks_H.astype(jnp.float32).reshape(groups, -1, 1, 1)
        top = jnp.maximum(top, sinks)
    weights = jnp.exp(scores - lax.stop_gradient(top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks_H is not None:
        total = total + jnp.exp(sinks - lax.stop_gradient(top))
    weights = (weights / total).astype(v_BMGU.dtype)
    out = jnp.einsum("bghsm,bmgd->bsghd", weights, v_BMGU, preferred_element_type=jnp.float32)
    return out.reshape(*q_BSHQ.shape[:3], -1).astype(q_BSHQ.dtype)


def _blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(query start, query stop, first key) of each block of queries; its keys end where its queries do."""
    block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    starts = range(0, length, block)
    return [(start, min(start + block, length), 0 if window is None else max(0, start - window + 1)) for start in starts]


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """Masked scaled scores [B, G, H/G, q, k] in f32 of queries [B, q, G, H/G, Q] and keys [B, k, G, Q]."""
    scores = jnp.einsum("bqghd,bkgd->bghqk", q, k, preferred_element_type=jnp.float32) * scale
    return jnp.where(mask[:, None, None], scores, MASKED)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blockwise(q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, window: int | None, scale: float) -> jax.Array:
    return _blockwise_fwd(q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, window, scale)[0]


def _split_heads(x_BSHQ: jax.Array, groups: int) -> jax.Array:
    batch, length, heads, width = x_BSHQ.shape
    return x_BSHQ.reshape(batch, length, groups, heads // groups, width)


def _blockwise_fwd(q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, window: int | None, scale: float):
    q, sinks = _split_heads(q_BSHQ, k_BSGQ.shape[2]), sinks_H.reshape(k_BSGQ.shape[2], -1, 1, 1)
    outs, sums = [], []
    for start, stop, first in _blocks(q.shape[1], window):
        scores = _scores(q[:, start:stop], k_BSGQ[:, first:stop], visible(segments_BS, start, stop, first, stop, window), scale)
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - top)
        out = jnp.einsum("bghqk,bkgd->bghqd", weights.astype(v_BSGU.dtype), v_BSGU[:, first:stop], preferred_element_type=jnp.float32)
        outs.append(jnp.moveaxis(out / total, 3, 1).astype(q_BSHQ.dtype))
        sums.append((top + jnp.log(total))[..., 0])
    out_BSHU = jnp.concatenate(outs, axis=1).reshape(*q_BSHQ.shape[:3], -1)
    return out_BSHU, (q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, out_BSHU, jnp.concatenate(sums, axis=-1))


def _blockwise_bwd(window: int | None, scale: float, saved, dout_BSHU: jax.Array):
    q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, out_BSHU, logsum_BGHS = saved
    groups = k_BSGQ.shape[2]
    q, dout = _split_heads(q_BSHQ, groups), _split_heads(dout_BSHU, groups)
    # sum_k p * dp, the term that the softmax's normalisation subtracts, is out . dout for each query.
    inner = jnp.einsum("bqghd,bqghd->bghq", _split_heads(out_BSHU, groups), dout, preferred_element_type=jnp.float32)
    dk, dv = jnp.zeros_like(k_BSGQ, jnp.float32), jnp.zeros_like(v_BSGU, jnp.float32)
    dqs = []
    for start, stop, first in _blocks(q.shape[1], window):
        keys, values, queries, douts = k_BSGQ[:, first:stop], v_BSGU[:, first:stop], q[:, start:stop], dout[:, start:stop]
        scores = _scores(queries, keys, visible(segments_BS, start, stop, first, stop, window), scale)
        weights = jnp.exp(scores - logsum_BGHS[..., start:stop, None])
        dweights = jnp.einsum("bqghd,bkgd->bghqk", douts, values, preferred_element_type=jnp.float32)
        dscores = weights * (dweights - inner[..., start:stop, None]) * scale
        dscores, weights = dscores.astype(q.dtype), weights.astype(q.dtype)
        dqs.append(jnp.einsum("bghqk,bkgd->bqghd", dscores, keys, preferred_element_type=jnp.float32).astype(q.dtype))
        dk = dk.at[:, first:stop].add(jnp.einsum("bghqk,bqghd->bkgd", dscores, queries, preferred_element_type=jnp.float32))
        dv = dv.at[:, first:stop].add(jnp.einsum("bghqk,bqghd->bkgd", weights, douts, preferred_element_type=jnp.float32))
    dq_BSHQ = jnp.concatenate(dqs, axis=1).reshape(q_BSHQ.shape)
    # A sink's value is zero, so only the normalisation's term is left of its gradient.
    dsinks_H = -jnp.sum(jnp.exp(sinks_H.reshape(groups, -1, 1) - logsum_BGHS) * inner, axis=(0, 3)).reshape(-1)
    return dq_BSHQ, dk.astype(k_BSGQ.dtype), dv.astype(v_BSGU.dtype), dsinks_H, None


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)
