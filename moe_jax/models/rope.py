"""Rotary position embedding and its context extensions.

Sources: RoFormer (Su et al., 2021); linear position interpolation (Chen et al., 2023); dynamic NTK
scaling and YaRN (Peng et al., 2023); the wavelength bands of Llama 3.1 (2024).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.model import RopeConfig
from moe_jax.utils.annotations import Array, Float, Int


def frequencies(config: RopeConfig, head_width: int, length: int | jax.Array) -> tuple[Any, float]:
    """Angular frequencies, radians per token, f64 [rotated width / 2], and the factor on sines and
    cosines.

    `head_width` is the part of a head that may be rotated, of which `config.fraction` is. `length`
    is the number of positions in use, on which only `dynamic` depends; traced, it makes the
    frequencies a traced f32 array.
    """
    head_width = round(head_width * config.fraction)
    exponent = np.arange(0, head_width, 2) / head_width
    base = config.theta
    if config.scaling == "dynamic":
        xp = jnp if isinstance(length, jax.Array) else np
        stretch = config.factor * xp.maximum(length / config.original_length, 1) - (
            config.factor - 1
        )
        base = base * stretch ** (head_width / max(head_width - 2, 1))
    inverse = base**-exponent
    if config.scaling == "linear":
        return inverse / config.factor, 1.0
    if config.scaling == "llama3":
        rotations = config.original_length * inverse / (2 * np.pi)
        keep = (rotations - config.low_freq_factor) / (
            config.high_freq_factor - config.low_freq_factor
        )
        keep = np.clip(keep, 0.0, 1.0)
        return inverse * (keep + (1 - keep) / config.factor), 1.0
    if config.scaling == "yarn":
        keep = 1 - _yarn_ramp(config, head_width)
        factor = config.attention_factor or 0.1 * math.log(config.factor) + 1.0
        return inverse * (keep + (1 - keep) / config.factor), factor
    return inverse, 1.0


def _yarn_ramp(config: RopeConfig, head_width: int) -> np.ndarray:
    """0 where a frequency turns often within the original length, 1 where it hardly turns, linear
    between.
    """

    def dimension(rotations: float) -> float:
        return (
            head_width
            * math.log(config.original_length / (rotations * 2 * math.pi))
            / (2 * math.log(config.theta))
        )

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    return np.clip((np.arange(head_width // 2) - low) / (high - low if high != low else 1e-3), 0, 1)


def rotate(
    x_BSHQ: Float[Array, "B S H Q"],
    positions_BS: Int[Array, "B S"],
    frequency_F: Any,
    scale: float = 1.0,
) -> Float[Array, "B S H Q"]:
    """Turns the first half of each head's leading 2F dims against the second by position x
    frequency; angles are in f32.
    """
    rotated = 2 * len(frequency_F)
    angle_BSF = positions_BS[..., None].astype(jnp.float32) * jnp.asarray(frequency_F, jnp.float32)
    cos, sin = (fn(angle_BSF)[:, :, None] * scale for fn in (jnp.cos, jnp.sin))
    first, second = jnp.split(x_BSHQ[..., :rotated].astype(jnp.float32), 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if rotated < x_BSHQ.shape[-1]:
        parts.append(x_BSHQ[..., rotated:].astype(jnp.float32))
    turned = jnp.concatenate(parts, axis=-1)
    return jax.lax.convert_element_type(turned, x_BSHQ.dtype)
