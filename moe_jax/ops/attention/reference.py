"""Attention with all scores written out: what every back end must equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.ops.products import einsum_f32

MASKED = -1e30  # finite, so that a row that sees nothing gives numbers, not NaN


def visible(
    segments_BS: jax.Array, q_start: int, q_stop: int, k_start: int, k_stop: int, window: int | None
) -> jax.Array:
    """Which keys a query may see, bool [B, q, k], for static ranges of queries and keys."""
    back = np.arange(q_start, q_stop)[:, None] - np.arange(k_start, k_stop)[None, :]
    near = (back >= 0) if window is None else (back >= 0) & (back < window)
    same = segments_BS[:, q_start:q_stop, None] == segments_BS[:, None, k_start:k_stop]
    return same & jnp.asarray(near)


def reference_attention(
    q_BSHQ: jax.Array,
    k_BMGQ: jax.Array,
    v_BMGU: jax.Array,
    mask_BSM: jax.Array,
    scale: float,
    sinks_H: jax.Array | None,
    bias_HSM: jax.Array | None = None,
) -> jax.Array:
    """`attention` for a mask bool [B, S, M], which says what keys each query sees, and `bias_HSM`
    added to the scores; all scores [B, H, S, M] are in memory.
    """
    q, groups = split_heads(q_BSHQ, k_BMGQ.shape[2]), k_BMGQ.shape[2]
    scores = einsum_f32("bsghd,bmgd->bghsm", q, k_BMGQ) * scale
    if bias_HSM is not None:
        scores = scores + bias_HSM.reshape(groups, -1, *bias_HSM.shape[1:])
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
    out = einsum_f32("bghsm,bmgd->bsghd", weights, v_BMGU)
    return out.reshape(*q_BSHQ.shape[:3], -1).astype(q_BSHQ.dtype)


def split_heads(x_BSHQ: jax.Array, groups: int) -> jax.Array:
    """The heads by the key head that they read, [B, S, G, H/G, Q]."""
    batch, length, heads, width = x_BSHQ.shape
    return x_BSHQ.reshape(batch, length, groups, heads // groups, width)
