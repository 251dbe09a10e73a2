"""Keeping experts evenly used: auxiliary losses, and the bias that needs no loss.

Losses over the whole batch (Switch, Fedus et al., 2021; variance of usage) are nonlinear in the
batch's mean scores, so a batch cut into accumulation steps must not average them by parts. `losses`
takes the sums of the full batch beside those of the part: the value is the full batch's, and the
gradient is that of the full batch's loss with respect to this part, so the parts' gradients add up
exactly.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.config.model import MoEConfig
from moe_jax.moe.router import RouterStats
from moe_jax.utils.annotations import Array, Float, Int


def switch_loss(share_E: Float[Array, " E"], prob_E: Float[Array, " E"]) -> Float[Array, ""]:
    """E * sum of share x mean score: 1 when even. `share_E` and `prob_E` each sum to 1."""
    return share_E.shape[0] * jnp.sum(share_E * prob_E)


def variance_loss(prob_E: Float[Array, " E"]) -> Float[Array, ""]:
    """Variance over experts of usage, the mean score times E: 0 when even."""
    return jnp.mean((prob_E.shape[0] * prob_E - 1) ** 2)


def losses(
    config: MoEConfig, part: RouterStats, full: RouterStats
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(balance losses, z-loss) of one layer, weighted by their coefficients: this part's share of
    the full batch's.

    Both arguments are summed over the mesh; `full` equals `part` when the batch is not cut.
    """
    count = jnp.maximum(full.tokens, 1).astype(jnp.float32)  # a batch of padding costs nothing
    share_E, prob_E = _usage(config, part, full)
    # One whose coefficient is 0 is not computed: it may be infinite, and 0 times that is no number.
    aux = z = jnp.float32(0)
    if config.variance_loss:
        aux = aux + _share_of(config.variance_loss * variance_loss(prob_E), part, full)
    if config.aux_loss and config.aux_over == "layer":
        aux = aux + _share_of(config.aux_loss * switch_loss(share_E, prob_E), part, full)
    if config.sequence_aux_loss:
        aux = aux + config.sequence_aux_loss * part.sequence_aux / count
    if config.z_loss:
        z = config.z_loss * part.z / count
    return aux, z


def pooled_loss(config: MoEConfig, part: RouterStats, full: RouterStats) -> Float[Array, ""]:
    """The Switch loss of shares and mean scores that are averaged over all layers first, for
    `aux_over: model` with a coefficient; else 0.

    The arguments are those of `losses`, stacked over the layers.
    """
    if config.aux_over == "layer" or not config.aux_loss:
        return jnp.float32(0)
    share_LE, prob_LE = jax.vmap(lambda p, f: _usage(config, p, f))(part, full)
    loss = config.aux_loss * switch_loss(jnp.mean(share_LE, axis=0), jnp.mean(prob_LE, axis=0))

    def first(stats):
        return jax.tree.map(lambda a: a[0], stats)

    return _share_of(loss, first(part), first(full))  # all layers see the same tokens


def _usage(config: MoEConfig, part: RouterStats, full: RouterStats) -> tuple[jax.Array, jax.Array]:
    """Share of choices and mean score of each expert over the full batch; gradients reach the
    part's scores alone.
    """
    count = jnp.maximum(full.tokens, 1).astype(jnp.float32)
    part_prob_E = part.prob_E / count
    prob_E = lax.stop_gradient(full.prob_E / count - part_prob_E) + part_prob_E
    return lax.stop_gradient(full.load_E.astype(jnp.float32) / (config.top_k * count)), prob_E


def _share_of(loss: jax.Array, part: RouterStats, full: RouterStats) -> jax.Array:
    """The part's share of a loss of the full batch: the value is split by tokens, the gradient is
    whole.
    """
    count = jnp.maximum(full.tokens, 1).astype(jnp.float32)
    return (
        lax.stop_gradient(loss) * (part.tokens.astype(jnp.float32) / count)
        + loss
        - lax.stop_gradient(loss)
    )


def update_bias(bias_LE: Float[Array, "L E"], load_LE: Int[Array, "L E"], rate: float) -> jax.Array:
    """Moves each expert's bias by `rate` against its load (DeepSeek-V3, 2024): up when under the
    mean, down when over.
    """
    load_LE = load_LE.astype(jnp.float32)
    return bias_LE + rate * jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)
