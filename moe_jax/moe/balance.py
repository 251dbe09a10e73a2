"""Keeping experts evenly used: auxiliary losses and the bias that needs none.

Losses over the whole batch (Switch, Fedus et al., 2021; variance of usage) are nonlinear in the batch's mean
scores, so a batch cut into accumulation steps must not average them by parts. `losses` takes the sums of the
full batch beside those of the part: the value is the full batch's, and the gradient is that of the full
batch's loss with respect to this part, so the parts' gradients add up exactly.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.annotations import Array, Float, Int
from moe_jax.moe.router import RouterStats
from moe_jax.schema import MoEConfig


def switch_loss(share_E: Float[Array, " E"], prob_E: Float[Array, " E"]) -> Float[Array, ""]:
    """E * sum of share x mean score: 1 when even. `share_E` and `prob_E` each sum to 1."""
    return share_E.shape[0] * jnp.sum(share_E * prob_E)


def variance_loss(prob_E: Float[Array, " E"]) -> Float[Array, ""]:
    """Variance over experts of usage, the mean score times E: 0 when even."""
    return jnp.mean((prob_E.shape[0] * prob_E - 1) ** 2)


def losses(config: MoEConfig, part: RouterStats, full: RouterStats) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(balance losses, z-loss) of one layer, weighted by their coefficients: this part's share of the full batch's.

    Both arguments are summed over the mesh; `full` equals `part` when the batch is not cut.
    """
    count = jnp.maximum(full.tokens, 1).astype(jnp.float32)  # a batch of padding costs nothing
    part_prob_E = part.prob_E / count
    prob_E = lax.stop_gradient(full.prob_E / count - part_prob_E) + part_prob_E
    share_E = lax.stop_gradient(full.load_E.astype(jnp.float32) / (config.top_k * count))
    batch = config.aux_loss * switch_loss(share_E, prob_E) + config.variance_loss * variance_loss(prob_E)
    # The value is split by tokens, the gradient is whole.
    batch = lax.stop_gradient(batch) * (part.tokens.astype(jnp.float32) / count) + batch - lax.stop_gradient(batch)
    aux = batch + config.sequence_aux_loss * part.sequence_aux / count
    return aux, config.z_loss * part.z / count


def update_bias(bias_LE: Float[Array, "L E"], load_LE: Int[Array, "L E"], rate: float) -> jax.Array:
    """Moves each expert's bias by `rate` against its load (DeepSeek-V3, 2024): up when under the mean, down when over."""
    load_LE = load_LE.astype(jnp.float32)
    return bias_LE + rate * jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)
