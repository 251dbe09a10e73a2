"""Series to patches: normalisation of each series by itself, and the cut into patches.

A value that is not there is NaN. All of this is in f32, whatever the model computes in.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.utils.annotations import Array, Bool, Float

LEAST_SCALE = 1e-5  # of a series whose values are all alike


class SeriesScale(NamedTuple):
    """What a series is normalised by: minus `loc`, divided by `scale`, then arcsinh if asked
    for.
    """

    loc_B: jax.Array
    scale_B: jax.Array
    arcsinh: bool

    def normalise(self, x_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
        """Values in units of the model."""
        x_BT = (x_BT.astype(jnp.float32) - self.loc_B[:, None]) / self.scale_B[:, None]
        return jnp.arcsinh(x_BT) if self.arcsinh else x_BT

    def restore(self, y_BQH: Float[Array, "B Q H"]) -> Float[Array, "B Q H"]:
        """Values in units of the series, f32."""
        y_BQH = y_BQH.astype(jnp.float32)
        y_BQH = jnp.sinh(y_BQH) if self.arcsinh else y_BQH
        return y_BQH * self.scale_B[:, None, None] + self.loc_B[:, None, None]


def scale_of(x_BT: Float[Array, "B T"], *, arcsinh: bool = False) -> SeriesScale:
    """Mean and standard deviation of the values that are there; 0 and 1 where there are none."""
    x_BT = x_BT.astype(jnp.float32)
    seen_BT = ~jnp.isnan(x_BT)
    count_B = jnp.maximum(jnp.sum(seen_BT, axis=-1), 1).astype(jnp.float32)
    loc_B = jnp.sum(jnp.where(seen_BT, x_BT, 0), axis=-1) / count_B
    squares_BT = jnp.where(seen_BT, jnp.square(x_BT - loc_B[:, None]), 0)
    scale_B = jnp.sqrt(jnp.sum(squares_BT, axis=-1) / count_B)
    scale_B = jnp.where(scale_B == 0, LEAST_SCALE, scale_B)
    return SeriesScale(loc_B, jnp.where(jnp.any(seen_BT, axis=-1), scale_B, 1.0), arcsinh)


class Patches(NamedTuple):
    """Series cut into N patches of P values."""

    values_BNP: Float[Array, "B N P"]  # 0 where none is there
    seen_BNP: Float[Array, "B N P"]  # 1 where one is, else 0
    mask_BN: Bool[Array, "B N"]  # whether a patch has any


def cut_into_patches(x_BT: Float[Array, "B T"], patch: int) -> Patches:
    """Patches that end where the series ends; the first is filled up in front with nothing."""
    x_BT = jnp.pad(x_BT, ((0, 0), (-x_BT.shape[1] % patch, 0)), constant_values=jnp.nan)
    x_BNP = x_BT.reshape(x_BT.shape[0], -1, patch)
    seen_BNP = ~jnp.isnan(x_BNP)
    values_BNP = jnp.where(seen_BNP, x_BNP, 0)
    return Patches(values_BNP, seen_BNP.astype(x_BT.dtype), jnp.any(seen_BNP, axis=-1))


def quantile_errors(
    forecast_BQH: Float[Array, "B Q H"],
    target_BT: Float[Array, "B T"],
    quantiles: tuple[float, ...],
) -> Float[Array, "B Q H"]:
    """Twice the quantile loss of each level and step, in units of the model; 0 where the target is
    missing or shorter than the forecast. T <= H.
    """
    missing = forecast_BQH.shape[-1] - target_BT.shape[-1]
    target_BH = jnp.pad(target_BT, ((0, 0), (0, missing)), constant_values=jnp.nan)
    seen_BH = ~jnp.isnan(target_BH)
    target_B1H = jnp.where(seen_BH, target_BH, 0)[:, None]
    level_Q1 = jnp.asarray(quantiles, jnp.float32)[:, None]
    below = (target_B1H <= forecast_BQH).astype(jnp.float32)
    error_BQH = 2 * jnp.abs((target_B1H - forecast_BQH) * (below - level_Q1))
    return error_BQH * seen_BH[:, None]
