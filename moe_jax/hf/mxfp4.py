"""MXFP4, the microscaling format of the OCP specification (v1.0, 2023), read as gpt-oss checkpoints
store it.

A block of 32 values shares one scale, a power of two stored as an exponent byte (E8M0); each value
has 4 bits (E2M1), two to a byte, the first in the low half. The last dimension of a tensor is what
is cut into blocks.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BLOCK_SIZE = 32

_HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUE = np.concatenate([_HALF, -_HALF])  # the sign is the highest of the four bits
_PAIR = np.stack(
    [np.tile(_VALUE, 16), np.repeat(_VALUE, 16)], axis=1
)  # of each byte, the low half first
_SCALE = np.append(
    np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan)
)  # exponent 255 is no number


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bf16 [..., 32 x N] from blocks, uint8 [..., N, 16], and scales, uint8 [..., N]; exact, as
    bf16 has room for all of them.
    """
    values = _PAIR[blocks].reshape(*scales.shape, BLOCK_SIZE) * _SCALE[scales][..., None]
    return values.astype(ml_dtypes.bfloat16).reshape(*scales.shape[:-1], -1)
