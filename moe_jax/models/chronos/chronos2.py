"""Chronos-2: an encoder of patches that attends along time, then between the series of a group.

Rows come in groups [G, R, T]: R series each, of which `real_GR` says which are there. A group is on
one device, so groups are what a mesh splits.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config.model import RopeConfig
from moe_jax.models.chronos.config import Chronos2Config
from moe_jax.models.chronos.layers import (
    ReluFeedForward,
    ResidualBlock,
    UnscaledAttention,
    stack_norm,
)
from moe_jax.models.chronos.patches import (
    SeriesScale,
    cut_into_patches,
    quantile_errors,
    scale_of,
)
from moe_jax.models.chronos.stacks import stacked, through
from moe_jax.models.rope import frequencies, rotate
from moe_jax.ops.attention.api import full_attention
from moe_jax.parallel.sharding import gather, param
from moe_jax.utils.annotations import Array, Bool, Float


class GroupBlock(nnx.Module):
    """Attention along time, attention between the rows of a group, then a feed-forward part."""

    def __init__(self, config: Chronos2Config, *, rngs: nnx.Rngs):
        stack = config.stack
        self.rope, self.head_width = RopeConfig(theta=config.rope_theta), stack.head_width
        self.time_norm = stack_norm(stack, rngs)
        self.time = UnscaledAttention(stack, rngs=rngs)
        self.group_norm = stack_norm(stack, rngs)
        self.group = UnscaledAttention(stack, rngs=rngs)
        self.mlp_norm = stack_norm(stack, rngs)
        self.mlp = ReluFeedForward(stack, rngs=rngs)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        mask_BS: Bool[Array, "B S"],
        mask_GRS: Bool[Array, "G R S"],
    ) -> Float[Array, "B S D"]:
        x_BSD = x_BSD + self._along_time(self.time_norm(x_BSD), mask_BS)
        x_BSD = x_BSD + self._in_groups(self.group_norm(x_BSD), mask_GRS)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))

    def _along_time(self, x_BSD: jax.Array, mask_BS: jax.Array) -> jax.Array:
        length = x_BSD.shape[1]
        positions_1S = jnp.arange(length)[None]
        turn, scale = frequencies(self.rope, self.head_width, length)
        k_BSHQ, v_BSHQ = self.time.keys_values(x_BSD)
        q_BSHQ, k_BSHQ = (
            rotate(part, jnp.broadcast_to(positions_1S, part.shape[:2]), turn, scale)
            for part in (self.time.queries(x_BSD), k_BSHQ)
        )
        out_BSHQ = full_attention(q_BSHQ, k_BSHQ, v_BSHQ, mask_BS[:, None])
        return self.time.project_out(out_BSHQ)

    def _in_groups(self, x_BSD: jax.Array, mask_GRS: jax.Array) -> jax.Array:
        groups, rows, length = mask_GRS.shape
        if rows == 1:  # which reads itself alone
            return self.group.project_out(self.group.values(x_BSD))

        def by_time(x_BSHQ: jax.Array) -> jax.Array:
            x_GRSHQ = x_BSHQ.reshape(groups, rows, *x_BSHQ.shape[1:])
            return jnp.swapaxes(x_GRSHQ, 1, 2).reshape(groups * length, rows, *x_BSHQ.shape[2:])

        parts = (self.group.queries(x_BSD), *self.group.keys_values(x_BSD))
        mask_N1R = jnp.swapaxes(mask_GRS, 1, 2).reshape(groups * length, 1, rows)
        q_NRHQ, k_NRHQ, v_NRHQ = map(by_time, parts)
        out_NRHQ = full_attention(q_NRHQ, k_NRHQ, v_NRHQ, mask_N1R)
        out_GSRHQ = out_NRHQ.reshape(groups, length, *out_NRHQ.shape[1:])
        out_GRSHQ = jnp.swapaxes(out_GSRHQ, 1, 2)
        return self.group.project_out(out_GRSHQ.reshape(-1, *out_GRSHQ.shape[2:]))


class GroupEncoder(nnx.Module):
    """Embedded patches in, normalised states out."""

    def __init__(self, config: Chronos2Config, *, rngs: nnx.Rngs):
        self.blocks = stacked(GroupBlock, config, config.stack.num_layers, rngs)
        self.norm = stack_norm(config.stack, rngs)

    def __call__(
        self, x_BSD: Float[Array, "B S D"], mask_BS: Bool[Array, "B S"], real_GR: Bool[Array, "G R"]
    ) -> Float[Array, "B S D"]:
        mask_GRS = mask_BS.reshape(*real_GR.shape, -1) & real_GR[..., None]
        return self.norm(through(self.blocks, x_BSD, mask_BS, mask_GRS))


class EncodedRows(NamedTuple):
    """Rows as the encoder leaves them."""

    states_BMD: jax.Array  # of the context's patches, REG and the future's patches
    mask_BM: jax.Array
    scale: SeriesScale
    known_BH: jax.Array  # which future values were given


class Chronos2(nnx.Module):
    """Groups of series and what is known of their future, to quantiles of their next steps."""

    def __init__(self, config: Chronos2Config, *, rngs: nnx.Rngs):
        self.config = config
        stack, factor = config.stack, config.stack.init_factor
        outputs = len(config.quantiles) * config.patch
        self.shared = param(rngs, (stack.width, config.vocab_size), ("width", "tokens"), factor)
        self.input_patch = ResidualBlock(
            3 * config.patch, stack.hidden, stack.width, ("patch", "width"), factor, rngs=rngs
        )
        self.encoder = GroupEncoder(config, rngs=rngs)
        self.output_patch = ResidualBlock(
            stack.width, stack.hidden, outputs, ("width", "patch"), factor, rngs=rngs
        )

    def encode(
        self,
        context_GRT: Float[Array, "G R T"],
        future_GRH: Float[Array, "G R H"],
        real_GR: Bool[Array, "G R"],
    ) -> EncodedRows:
        """The last `context_length` values of each row and its future, a whole number of patches
        whose values are NaN where they are not known, as states.
        """
        config = self.config
        context_BT = context_GRT.reshape(-1, context_GRT.shape[-1])[:, -config.context_length :]
        future_BH = future_GRH.reshape(-1, future_GRH.shape[-1])
        scale = scale_of(context_BT, arcsinh=config.use_arcsinh)
        past = cut_into_patches(scale.normalise(context_BT), config.patch)
        ahead = cut_into_patches(scale.normalise(future_BH), config.patch)
        steps = past.mask_BN.shape[1] * config.patch
        parts = [self._embed(past.values_BNP, past.seen_BNP, -steps)]
        masks = [past.mask_BN]
        if config.use_reg_token:
            row_D = gather(self.shared, jnp.float32)[:, config.reg]
            parts.append(jnp.broadcast_to(row_D, (len(context_BT), 1, len(row_D))))
            masks.append(jnp.ones_like(past.mask_BN[:, :1]))
        parts.append(self._embed(ahead.values_BNP, ahead.seen_BNP, 0))
        masks.append(jnp.ones_like(ahead.mask_BN))
        mask_BM = jnp.concatenate(masks, axis=1)
        states_BMD = self.encoder(jnp.concatenate(parts, axis=1), mask_BM, real_GR)
        return EncodedRows(states_BMD, mask_BM, scale, ~jnp.isnan(future_BH))

    def decode(self, encoded: EncodedRows) -> Float[Array, "B Q H"]:
        """Quantiles in units of the model."""
        patches = encoded.known_BH.shape[1] // self.config.patch
        y_BNO = self.output_patch(encoded.states_BMD[:, -patches:])
        y_BNQP = y_BNO.reshape(*y_BNO.shape[:2], len(self.config.quantiles), -1)
        return jnp.swapaxes(y_BNQP, 1, 2).reshape(len(y_BNO), len(self.config.quantiles), -1)

    def __call__(
        self,
        context_GRT: Float[Array, "G R T"],
        future_GRH: Float[Array, "G R H"],
        real_GR: Bool[Array, "G R"],
    ) -> Float[Array, "G R Q H"]:
        encoded = self.encode(context_GRT, future_GRH, real_GR)
        y_BQH = encoded.scale.restore(self.decode(encoded))
        return y_BQH.reshape(*real_GR.shape, *y_BQH.shape[1:])

    def losses(
        self,
        context_GRT: Float[Array, "G R T"],
        future_GRH: Float[Array, "G R H"],
        real_GR: Bool[Array, "G R"],
        target_GRH: Float[Array, "G R H"],
    ) -> Float[Array, "G R"]:
        """The quantile loss of each row, the mean over steps, summed over levels; a step that is
        known already or missing in the target counts as 0.
        """
        encoded = self.encode(context_GRT, future_GRH, real_GR)
        target_BH = encoded.scale.normalise(target_GRH.reshape(-1, target_GRH.shape[-1]))
        errors_BQH = quantile_errors(self.decode(encoded), target_BH, self.config.quantiles)
        errors_BQH = jnp.where(encoded.known_BH[:, None], 0, errors_BQH)
        return jnp.sum(jnp.mean(errors_BQH, axis=-1), axis=-1).reshape(real_GR.shape)

    def _embed(self, values_BNP: jax.Array, seen_BNP: jax.Array, start: int) -> jax.Array:
        """Patches from the step `start` on, counted from the forecast's first, embedded."""
        steps = jnp.arange(start, start + values_BNP.shape[1] * self.config.patch)
        time_NP = (steps.astype(jnp.float32) / self.config.time_scale).reshape(values_BNP.shape[1:])
        time_BNP = jnp.broadcast_to(time_NP, values_BNP.shape)
        return self.input_patch(jnp.concatenate([time_BNP, values_BNP, seen_BNP], axis=-1))
