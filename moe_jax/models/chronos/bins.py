"""Chronos' tokens: values divided by the mean of a context's absolute values, in bins of equal
width. In numpy, all in f32: its rounding decides at the edges of bins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_jax.models.chronos.config import BinsConfig

FARTHEST = np.float32(1e20)  # the outer edge of the outermost bins


class Tokens(NamedTuple):
    """Series as tokens."""

    ids_BT: np.ndarray  # i32
    mask_BT: np.ndarray  # bool, which of them stand for a value or the end
    scale_B: np.ndarray  # f32, what the values were divided by


def centers(config: BinsConfig) -> np.ndarray:
    """The value of each bin, f32 [N], made from both ends as torch's linspace makes it."""
    count = config.num_tokens - config.num_special - 1
    low, high = np.float32(config.low), np.float32(config.high)
    step, at = (high - low) / np.float32(count - 1), np.arange(count)
    # one rounding for product and sum together, as a fused multiply-add has it
    wide = np.float64(step)
    up = (np.float64(low) + wide * at).astype(np.float32)
    down = (np.float64(high) - wide * (count - 1 - at)).astype(np.float32)
    return np.where(at < count // 2, up, down)


def encode_context(context_BT: np.ndarray, config: BinsConfig) -> Tokens:
    """Tokens of contexts, NaN where a value is missing, with the token of the end behind."""
    context_BT = np.asarray(context_BT, np.float32)
    seen_BT = ~np.isnan(context_BT)
    total_B = np.where(seen_BT, np.abs(context_BT), 0).sum(axis=-1, dtype=np.float32)
    scale_B = total_B / np.maximum(seen_BT.sum(axis=-1), 1).astype(np.float32)
    scale_B = np.where(scale_B > 0, scale_B, np.float32(1))
    return _with_end(_bin_of(context_BT, scale_B, config), seen_BT, scale_B, config)


def encode_target(target_BT: np.ndarray, scale_B: np.ndarray, config: BinsConfig) -> Tokens:
    """Tokens of what comes after contexts of that scale, with the token of the end behind."""
    target_BT = np.asarray(target_BT, np.float32)
    ids_BT = _bin_of(target_BT, scale_B, config)
    return _with_end(ids_BT, ~np.isnan(target_BT), scale_B, config)


def decode_tokens(ids: np.ndarray, scale_B: np.ndarray, config: BinsConfig) -> np.ndarray:
    """Values f32 [B, ...] of tokens [B, ...]; special ones are the lowest bin."""
    values = centers(config)
    bins = np.clip(ids - config.num_special - 1, 0, len(values) - 1)
    return values[bins] * scale_B.reshape(-1, *[1] * (ids.ndim - 1))


def _bin_of(values_BT: np.ndarray, scale_B: np.ndarray, config: BinsConfig) -> np.ndarray:
    """The token of each value, that of padding for NaN."""
    middle = centers(config)
    edges = np.concatenate([[-FARTHEST], (middle[1:] + middle[:-1]) / np.float32(2), [FARTHEST]])
    found = np.searchsorted(edges.astype(np.float32), values_BT / scale_B[:, None], side="right")
    ids_BT = np.clip(found + config.num_special, 0, config.num_tokens - 1)
    return np.where(np.isnan(values_BT), config.pad, ids_BT).astype(np.int32)


def _with_end(
    ids_BT: np.ndarray, mask_BT: np.ndarray, scale_B: np.ndarray, config: BinsConfig
) -> Tokens:
    if config.use_eos:
        behind = ((0, 0), (0, 1))
        ids_BT = np.pad(ids_BT, behind, constant_values=config.eos)
        mask_BT = np.pad(mask_BT, behind, constant_values=True)
    return Tokens(ids_BT, mask_BT, scale_B)
