"""Chronos-Bolt: patches of a series in, quantiles of its next steps out of one pass."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.chronos.config import ChronosBoltConfig
from moe_jax.models.chronos.layers import ResidualBlock
from moe_jax.models.chronos.patches import (
    SeriesScale,
    cut_into_patches,
    quantile_errors,
    scale_of,
)
from moe_jax.models.chronos.stacks import Decoder, Encoder
from moe_jax.parallel.collectives import vary, vma
from moe_jax.parallel.sharding import gather, param
from moe_jax.utils.annotations import Array, Float


class Encoded(NamedTuple):
    """Series as an encoder takes or leaves them."""

    states_BMD: jax.Array
    mask_BM: jax.Array  # which of them stand for something that was observed
    scale: SeriesScale


class BoltEnds(nnx.Module):
    """What is before the encoder and behind the decoder: patches in, quantiles out."""

    def __init__(self, config: ChronosBoltConfig, token_std: float, *, rngs: nnx.Rngs):
        """`token_std` is the size of the embeddings of REG and the decoder's first token."""
        self.config = config
        stack, factor = config.stack, config.stack.init_factor
        outputs = len(config.quantiles) * config.prediction_length
        self.shared = param(rngs, (stack.width, config.vocab_size), ("width", "tokens"), token_std)
        self.input_patch = ResidualBlock(
            2 * config.patch, stack.hidden, stack.width, ("patch", "width"), factor, rngs=rngs
        )
        self.output_patch = ResidualBlock(
            stack.width, stack.hidden, outputs, ("width", "patch"), factor, rngs=rngs
        )

    def embed(self, context_BT: Float[Array, "B T"]) -> Encoded:
        """The last `context_length` values, normalised, as what an encoder takes: their patches
        and, last of all, REG.
        """
        context_BT = context_BT[:, -self.config.context_length :].astype(jnp.float32)
        scale = scale_of(context_BT)
        patches = cut_into_patches(scale.normalise(context_BT), self.config.patch)
        inputs = jnp.concatenate([patches.values_BNP, patches.seen_BNP], axis=-1)
        x_BMD, mask_BM = self.input_patch(inputs), patches.mask_BN
        if self.config.use_reg_token:
            x_BMD = jnp.concatenate([x_BMD, self.token(self.config.reg, x_BMD)], axis=1)
            mask_BM = jnp.pad(mask_BM, ((0, 0), (0, 1)), constant_values=True)
        return Encoded(x_BMD, mask_BM, scale)

    def quantiles_of(self, y_B1D: Float[Array, "B 1 D"]) -> Float[Array, "B Q H"]:
        """Quantiles in units of the model from what the decoder makes of its one token."""
        y_B1O = self.output_patch(y_B1D)
        return y_B1O.reshape(len(y_B1O), len(self.config.quantiles), -1)

    def losses_of(
        self, y_BQH: Float[Array, "B Q H"], scale: SeriesScale, target_BT: Float[Array, "B T"]
    ) -> Float[Array, " B"]:
        """The quantile loss of each series, as in the released code: the mean over levels, summed
        over steps. A target may be shorter than the forecast, and NaN where it is missing.
        """
        errors_BQH = quantile_errors(y_BQH, scale.normalise(target_BT), self.config.quantiles)
        return jnp.sum(jnp.mean(errors_BQH, axis=1), axis=-1)

    def token(self, token: int, like_BMD: jax.Array) -> jax.Array:
        """The embedding of a token for each series, [B, 1, D]."""
        row_D = vary(gather(self.shared, like_BMD.dtype)[:, token], vma(like_BMD))
        return jnp.broadcast_to(row_D, (len(like_BMD), 1, len(row_D)))


class ChronosBolt(nnx.Module):
    """Series [B, T] to quantiles [B, Q, H] of the `prediction_length` steps after them."""

    def __init__(self, config: ChronosBoltConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.ends = BoltEnds(config, config.stack.init_factor, rngs=rngs)
        self.encoder = Encoder(config.stack, rngs=rngs)
        self.decoder = Decoder(config.stack, rngs=rngs)

    def encode(self, context_BT: Float[Array, "B T"]) -> Encoded:
        """Series as the encoder leaves them."""
        given = self.ends.embed(context_BT)
        return given._replace(states_BMD=self.encoder(given.states_BMD, given.mask_BM))

    def decode(self, encoded: Encoded) -> Float[Array, "B Q H"]:
        """Quantiles in units of the model."""
        start_B1D = self.ends.token(self.config.start, encoded.states_BMD)
        return self.ends.quantiles_of(self.decoder(start_B1D, encoded.states_BMD, encoded.mask_BM))

    def __call__(self, context_BT: Float[Array, "B T"]) -> Float[Array, "B Q H"]:
        encoded = self.encode(context_BT)
        return encoded.scale.restore(self.decode(encoded))

    def losses(
        self, context_BT: Float[Array, "B T"], target_BH: Float[Array, "B H"]
    ) -> Float[Array, " B"]:
        """As `BoltEnds.losses_of`."""
        encoded = self.encode(context_BT)
        return self.ends.losses_of(self.decode(encoded), encoded.scale, target_BH)
