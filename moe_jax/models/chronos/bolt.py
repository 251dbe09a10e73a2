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
    """Series as an encoder leaves them."""

    states_BMD: jax.Array
    mask_BM: jax.Array  # which of them stand for something that was observed
    scale: SeriesScale


class ChronosBolt(nnx.Module):
    """Series [B, T] to quantiles [B, Q, H] of the `prediction_length` steps after them."""

    def __init__(self, config: ChronosBoltConfig, *, rngs: nnx.Rngs):
        self.config = config
        stack, factor = config.stack, config.stack.init_factor
        outputs = len(config.quantiles) * config.prediction_length
        self.shared = param(rngs, (stack.width, config.vocab_size), ("width", "tokens"), factor)
        self.input_patch = ResidualBlock(
            2 * config.patch, stack.hidden, stack.width, ("patch", "width"), factor, rngs=rngs
        )
        self.encoder = Encoder(stack, rngs=rngs)
        self.decoder = Decoder(stack, rngs=rngs)
        self.output_patch = ResidualBlock(
            stack.width, stack.hidden, outputs, ("width", "patch"), factor, rngs=rngs
        )

    def encode(self, context_BT: Float[Array, "B T"]) -> Encoded:
        """The last `context_length` values, normalised, as states of their patches and, last of
        all, of REG.
        """
        context_BT = context_BT[:, -self.config.context_length :].astype(jnp.float32)
        scale = scale_of(context_BT)
        patches = cut_into_patches(scale.normalise(context_BT), self.config.patch)
        inputs = jnp.concatenate([patches.values_BNP, patches.seen_BNP], axis=-1)
        x_BMD, mask_BM = self.input_patch(inputs), patches.mask_BN
        if self.config.use_reg_token:
            x_BMD = jnp.concatenate([x_BMD, self._token(self.config.reg, x_BMD)], axis=1)
            mask_BM = jnp.pad(mask_BM, ((0, 0), (0, 1)), constant_values=True)
        return Encoded(self.encoder(x_BMD, mask_BM), mask_BM, scale)

    def decode(self, encoded: Encoded) -> Float[Array, "B Q H"]:
        """Quantiles in units of the model."""
        start_B1D = self._token(self.config.start, encoded.states_BMD)
        y_B1D = self.decoder(start_B1D, encoded.states_BMD, encoded.mask_BM)
        y_B1O = self.output_patch(y_B1D)
        return y_B1O.reshape(len(y_B1O), len(self.config.quantiles), -1)

    def __call__(self, context_BT: Float[Array, "B T"]) -> Float[Array, "B Q H"]:
        encoded = self.encode(context_BT)
        return encoded.scale.restore(self.decode(encoded))

    def losses(
        self, context_BT: Float[Array, "B T"], target_BH: Float[Array, "B H"]
    ) -> Float[Array, " B"]:
        """The quantile loss of each series, as in the released code: the mean over levels, summed
        over steps. A target may be shorter than the forecast, and NaN where it is missing.
        """
        encoded = self.encode(context_BT)
        errors_BQH = quantile_errors(
            self.decode(encoded), encoded.scale.normalise(target_BH), self.config.quantiles
        )
        return jnp.sum(jnp.mean(errors_BQH, axis=1), axis=-1)

    def _token(self, token: int, like_BMD: jax.Array) -> jax.Array:
        """The embedding of a token for each series, [B, 1, D]."""
        row_D = vary(gather(self.shared, like_BMD.dtype)[:, token], vma(like_BMD))
        return jnp.broadcast_to(row_D, (len(like_BMD), 1, len(row_D)))
