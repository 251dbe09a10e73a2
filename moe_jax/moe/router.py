"""Choosing experts: scores, selection, weights, and the sums from which load and losses are
computed.

Everything is in f32 and in logical expert order. Statistics are sums over what was routed on the
device, its valid tokens or (`moe.route_by: sequence`) its sequences, which are then what "token"
means here; `total` sums them over the mesh, after which every device holds the same sums. Sources:
softmax top-k (Shazeer et al., 2017), sigmoid scores with a balance bias and group-limited selection
(DeepSeek-V2 and V3, 2024), z-loss (ST-MoE, Zoph et al., 2022).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config.model import MoEConfig
from moe_jax.moe.dispatch import TABLES
from moe_jax.ops.linear import project
from moe_jax.parallel.collectives import MESH_AXES, MeshAxes, psum
from moe_jax.parallel.sharding import bias, gather, param
from moe_jax.utils.annotations import Array, Bool, Float, Int, Key

# Score of a dropped-out expert: finite, so that it can still fill a place that no other takes.
NEVER = -1e9


class RouterStats(NamedTuple):
    """Sums over valid tokens."""

    load_E: Int[Array, " E"]  # choices of each expert
    prob_E: Float[Array, " E"]  # scores, normalised to sum to 1 per token
    z: Float[Array, ""]  # squared logsumexp of the logits
    entropy: Float[Array, ""]  # nats, of the normalised scores
    sequence_aux: Float[Array, ""]  # tokens of each sequence x its Switch loss
    tokens: Int[Array, ""]


class Routing(NamedTuple):
    """What the router decided for each token."""

    expert_TK: Int[Array, "T K"]  # logical experts; E where the token is padding
    weight_TK: Float[Array, "T K"]


class Router(nnx.Module):
    """Routes tokens to `top_k` of `num_experts` experts."""

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.weight = param(rngs, (width, config.num_experts), ("width", "experts"), width**-0.5)
        if config.router_bias:
            self.bias = bias((config.num_experts,), ("experts",))

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        valid_BS: Bool[Array, "B S"],
        bias_E: Float[Array, " E"],
        keys_B: Key[Array, " B"] | None,
    ) -> tuple[Routing, RouterStats]:
        """Routes each token. `bias_E` shifts selection, not weights; `keys_B`, one per sequence,
        turn training noise on.
        """
        config = self.config
        x_BSD = x_BSD.astype(jnp.float32)
        dropped_BE = None
        if keys_B is not None:
            keys_BN = jax.vmap(lambda key: jax.random.split(key, 2))(keys_B)
            if config.input_noise:
                draw = jax.vmap(
                    lambda key: jax.random.uniform(key, x_BSD.shape[1:], minval=-1.0, maxval=1.0)
                )
                x_BSD = x_BSD * (1 + config.input_noise * draw(keys_BN[:, 0]))
            if config.expert_dropout:
                drop = jax.vmap(
                    lambda key: jax.random.bernoulli(
                        key, config.expert_dropout, (config.num_experts,)
                    )
                )
                dropped_BE = drop(keys_BN[:, 1])
        logits_BSE, score_BSE = self._score(x_BSD)
        expert_BSK, weight_BSK = select(config, score_BSE, bias_E, dropped_BE)
        routing = _routing(config, expert_BSK, weight_BSK, valid_BS)
        expert_BSK = routing.expert_TK.reshape(expert_BSK.shape)
        prob_BSE = probabilities(config, logits_BSE, score_BSE)
        return routing, measure(logits_BSE, prob_BSE, expert_BSK, valid_BS)

    def choose(
        self, x_BSD: Float[Array, "B S D"], valid_BS: Bool[Array, "B S"], bias_E: Float[Array, " E"]
    ) -> Routing:
        """Routes each token without noise or statistics, as inference does."""
        _, score_BSE = self._score(x_BSD.astype(jnp.float32))
        return _routing(self.config, *select(self.config, score_BSE, bias_E, None), valid_BS)

    def _score(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits and scores [B, S, E]."""
        # A GPU's default for f32 is TF32, whose rounding could choose other experts.
        logits_BSE = project(x_BSD, gather(self.weight), precision=lax.Precision.HIGHEST)
        if self.config.router_bias:
            logits_BSE = logits_BSE + gather(self.bias)
        logits_BSE = logits_BSE / self.config.temperature
        return logits_BSE, jax.nn.softmax(
            logits_BSE
        ) if self.config.score == "softmax" else jax.nn.sigmoid(logits_BSE)


def _routing(
    config: MoEConfig, expert_BSK: jax.Array, weight_BSK: jax.Array, valid_BS: jax.Array
) -> Routing:
    """One line per token; padding chooses expert E."""
    expert_BSK = jnp.where(valid_BS[..., None], expert_BSK, config.num_experts).astype(jnp.int32)
    return Routing(expert_BSK.reshape(-1, config.top_k), weight_BSK.reshape(-1, config.top_k))


def sequence_means(
    x_BSD: Float[Array, "B S D"], valid_BS: Bool[Array, "B S"]
) -> tuple[Float[Array, "B 1 D"], Bool[Array, "B 1"]]:
    """What a sequence is routed by, the mean of its valid tokens in f32, and whether it has any."""
    counts_BS1 = valid_BS[..., None].astype(jnp.float32)
    total_B1D = jnp.sum(x_BSD.astype(jnp.float32) * counts_BS1, axis=1, keepdims=True)
    mean_B1D = total_B1D / jnp.maximum(jnp.sum(counts_BS1, axis=1, keepdims=True), 1.0)
    return mean_B1D, jnp.any(valid_BS, axis=1, keepdims=True)


def for_tokens(config: MoEConfig, routing_B: Routing, valid_BS: Bool[Array, "B S"]) -> Routing:
    """The routes of B sequences as those of their tokens."""
    shape = (*valid_BS.shape, config.top_k)
    expert_BSK, weight_BSK = (jnp.broadcast_to(part[:, None], shape) for part in routing_B)
    return _routing(config, expert_BSK, weight_BSK, valid_BS)


def select(
    config: MoEConfig, score_BSE: jax.Array, bias_E: jax.Array, dropped_BE: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Experts [B, S, K] by biased score, best first, and their weights [B, S, K] from the unbiased
    scores.
    """
    ranked_BSE = lax.stop_gradient(score_BSE) + bias_E
    if dropped_BE is not None:
        ranked_BSE = jnp.where(dropped_BE[:, None], NEVER + ranked_BSE, ranked_BSE)
    if config.num_groups > 1:
        ranked_BSE = jnp.where(_open_groups(config, ranked_BSE), ranked_BSE, -jnp.inf)
    expert_BSK = checkpoint_name(lax.top_k(ranked_BSE, config.top_k)[1], TABLES)
    weight_BSK = _pick(score_BSE.shape[-1], score_BSE, expert_BSK)
    if config.normalize == "after":
        weight_BSK = _rescaled(weight_BSK)
    return expert_BSK, weight_BSK * config.routed_scale


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pick(num_experts: int, score_BSE: jax.Array, expert_BSK: jax.Array) -> jax.Array:
    """The scores of a token's experts, which are K different ones."""
    return jnp.take_along_axis(score_BSE, expert_BSK, axis=-1, mode="promise_in_bounds")


def _pick_fwd(num_experts: int, score_BSE: jax.Array, expert_BSK: jax.Array):
    return _pick(num_experts, score_BSE, expert_BSK), expert_BSK


def _pick_bwd(num_experts: int, expert_BSK: jax.Array, dweight_BSK: jax.Array):
    # A sum in place of the scatter that JAX would make of it, which a TPU sorts first.
    chosen_BSKE = expert_BSK[..., None] == jnp.arange(num_experts)
    return jnp.sum(jnp.where(chosen_BSKE, dweight_BSK[..., None], 0.0), axis=-2), None


_pick.defvjp(_pick_fwd, _pick_bwd)


def _rescaled(weight_BSK: jax.Array) -> jax.Array:
    """Weights that sum to 1 per token; zeros where all are zero.

    The gradient divides by the square of the sum, which is 0 in f32 for a sum below 1e-19, and 0/0
    where the scores have underflowed: such a sum counts as a constant.
    """
    sum_BS1 = jnp.sum(weight_BSK, axis=-1, keepdims=True) + 1e-20
    vanishing = sum_BS1 < 1e-15
    constant = weight_BSK / lax.stop_gradient(sum_BS1)
    return jnp.where(vanishing, constant, weight_BSK / jnp.where(vanishing, 1.0, sum_BS1))


def _open_groups(config: MoEConfig, ranked_BSE: jax.Array) -> jax.Array:
    """Which experts lie in a token's best groups, bool [B, S, E].

    A group counts by its best score with softmax (DeepSeek-V2), by its two best together with
    sigmoid (V3).
    """
    grouped = ranked_BSE.reshape(*ranked_BSE.shape[:-1], config.num_groups, -1)
    best, _ = lax.top_k(grouped, 1 if config.score == "softmax" else 2)
    _, chosen = lax.top_k(jnp.sum(best, axis=-1), config.top_groups)
    is_open = jnp.any(chosen[..., None] == jnp.arange(config.num_groups), axis=-2)
    return jnp.repeat(is_open, grouped.shape[-1], axis=-1)


def probabilities(config: MoEConfig, logits_BSE: jax.Array, score_BSE: jax.Array) -> jax.Array:
    """Scores that sum to 1 per token, f32 [B, S, E].

    Sigmoids may all underflow, but their logarithms do not, of which this is the softmax.
    """
    if config.score == "sigmoid":
        return jax.nn.softmax(jax.nn.log_sigmoid(logits_BSE))
    return score_BSE / jnp.sum(score_BSE, axis=-1, keepdims=True)


def measure(
    logits_BSE: jax.Array, prob_BSE: jax.Array, expert_BSK: jax.Array, valid_BS: jax.Array
) -> RouterStats:
    """Sums over this device's valid tokens; `load_E` and the sequences' shares of choices carry no
    gradient.
    """
    num_experts, top_k = prob_BSE.shape[-1], expert_BSK.shape[-1]
    load_BE = jnp.sum(
        expert_BSK[..., None] == jnp.arange(num_experts), axis=(1, 2), dtype=jnp.int32
    )
    counts_BS = valid_BS.astype(jnp.float32)
    prob_BE = jnp.sum(prob_BSE * counts_BS[..., None], axis=1)
    tokens_B = jnp.sum(valid_BS, axis=1, dtype=jnp.int32)
    share_BE = load_BE / (top_k * jnp.maximum(tokens_B, 1))[:, None]
    entropy_BS = -jnp.sum(prob_BSE * jnp.log(prob_BSE + 1e-20), axis=-1)
    return RouterStats(
        load_E=jnp.sum(load_BE, axis=0),
        prob_E=jnp.sum(prob_BE, axis=0),
        z=jnp.sum(jax.nn.logsumexp(logits_BSE, axis=-1) ** 2 * counts_BS),
        entropy=lax.stop_gradient(jnp.sum(entropy_BS * counts_BS)),
        sequence_aux=num_experts * jnp.sum(share_BE * prob_BE),
        tokens=jnp.sum(tokens_B),
    )


def no_stats(config: MoEConfig) -> RouterStats:
    """The sums over nothing."""
    zero, zero_E = jnp.float32(0), jnp.zeros(config.num_experts)
    return RouterStats(zero_E.astype(jnp.int32), zero_E, zero, zero, zero, jnp.int32(0))


def total(stats: RouterStats, axes: MeshAxes = MESH_AXES) -> RouterStats:
    """The sums over all devices that hold tokens; inside `shard_map`."""
    return psum(stats, axes.batch)
