"""Rotary position embedding and its context extensions.

Sources: RoFormer (Su et al., 2021); linear position interpolation (Chen et al., 2023); dynamic NTK scaling
and YaRN (Peng et al., 2023); the wavelength bands of Llama 3.1 (2024).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.annotations import Array, Float, Int
from moe_jax.schema import RopeConfig


def frequencies(config: RopeConfig, head_width: int, length: int) -> tuple[np.ndarray, float]:
    """Angular frequencies, radians a token, f64 [Q/2], and the factor on sines and cosines.

    `length` is the number of positions that will be used; only `dynamic` depends on it.
    """
    exponent = np.arange(0, head_width, 2) / head_width
    base = config.theta
    if config.scaling == "dynamic" and length > config.original_length:
        stretch = config.factor * length / config.original_length - (config.factor - 1)
        base = base * stretch ** (head_width / max(head_width - 2, 1))
    inverse = base**-exponent
    if config.scaling == "linear":
        return inverse / config.factor, 1.0
    if config.scaling == "llama3":
        rotations = config.original_length * inverse / (2 * np.pi)
        keep = (rotations - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return inverse * (keep + (1 - keep) / config.factor), 1.0
    if config.scaling == "yarn":
        keep = 1 - _yarn_ramp(config, head_width)
        return inverse * (keep + (1 - keep) / config.factor), 0.1 * math.log(config.factor) + 1.0
    return inverse, 1.0


def _yarn_ramp(config: RopeConfig, head_width: int) -> np.ndarray:
    """0 where a frequency turns often within the original length, 1 where it hardly turns, linear between."""

    def dimension(rotations: float) -> float:
        return head_width * math.log(config.original_length / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low = max(math.floor(dimension(config.beta_fast)), 0)
    high = min(math.ceil(dimension(config.beta_slow)), head_width - 1)
    return np.clip((np.arange(head_width // 2) - low) / max(high - low, 1e-3), 0, 1)


def rotate(
    x_BSHQ: Float[Array, "B S H Q"], positions_BS: Int[Array, "B S"], frequency_F: np.ndarray, scale: float = 1.0
) -> Float[Array, "B S H Q"]:
    """Turns each head's first half against its second half by position x frequency; angles are in f32."""
    angle_BSF = positions_BS[..., None].astype(jnp.float32) * jnp.asarray(frequency_F, jnp.float32)
    cos, sin = (fn(angle_BSF)[:, :, None] * scale for fn in (jnp.cos, jnp.sin))
    first, second = jnp.split(x_BSHQ.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jax.lax.convert_element_type(turned, x_BSHQ.dtype)
