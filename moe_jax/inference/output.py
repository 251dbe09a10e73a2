"""The end of a compiled program: logits or a score from final hidden states, inside `shard_map`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.models.batch import NewTokens
from moe_jax.models.transformer import Transformer
from moe_jax.ops.cross_entropy import linear_cross_entropy, logits
from moe_jax.parallel.collectives import psum
from moe_jax.parallel.sharding import axes_of


def whole_logits(transformer: Transformer, hidden_TD: jax.Array) -> jax.Array:
    """Logits over the whole vocabulary, f32 [T, V], on every device."""
    split = axes_of(transformer.head_parameter, "vocab")
    logits_TV = logits(hidden_TD, transformer.head_weights())
    if split and lax.axis_size(split) > 1:
        return lax.all_gather(logits_TV, split, axis=1, tiled=True, to="invarying")
    return psum(logits_TV, split)


def all_logits(transformer: Transformer, hidden_BSD: jax.Array) -> jax.Array:
    """Logits at every position, f32 [B, S, V]."""
    logits_TV = whole_logits(transformer, hidden_BSD.reshape(-1, hidden_BSD.shape[-1]))
    return logits_TV.reshape(*hidden_BSD.shape[:2], -1)


def last_logits(transformer: Transformer, hidden_BSD: jax.Array, new: NewTokens) -> jax.Array:
    """Logits after each row's last new token, f32 [B, V]."""
    last_B11 = jnp.maximum(new.length - 1, 0)[:, None, None]
    return whole_logits(transformer, jnp.take_along_axis(hidden_BSD, last_B11, axis=1)[:, 0])


def total_nats(
    transformer: Transformer, hidden_BSD: jax.Array, targets_BS: jax.Array, mask_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sum of the negative log-likelihoods, nats, of targets where `mask_BS` is 1, and the sum of
    the mask.
    """
    split = axes_of(transformer.head_parameter, "vocab")
    hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    args = (hidden_TD, transformer.head_weights(), targets_BS.reshape(-1), mask_BS.reshape(-1))
    axis = split if split and lax.axis_size(split) > 1 else None
    nats = linear_cross_entropy(*args, axis=axis)
    if axis is None:
        nats = psum(nats, split)  # over one device, for its type alone
    return psum(nats, ("data",)), psum(jnp.sum(mask_BS), ("data",))
