"""Comparisons of our Chronos models with what the library computed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.hf.chronos import ChronosCheckpoint
from tests.support.hf_cases import sample
from tests.support.slow import SLOW

# Gradients on eight devices are compared with the same recordings as those on one.
MESHES = [
    pytest.param({}, id="1", marks=SLOW),
    pytest.param({"data": 2, "expert": 2, "tensor": 2}, id="2x2x2"),
]
TOLERANCE = 1e-5  # of the size of a series, or of the largest entry


def assert_close(found: Any, wanted: np.ndarray, size: Any = None) -> None:
    """Equal but for a share of `size`, which goes with the first dim, or of what is wanted there,
    where that is larger; by default of the largest entry.
    """
    found = np.asarray(found)
    assert found.shape == wanted.shape
    size = np.abs(wanted).max() if size is None else np.asarray(size)
    if np.ndim(size):
        rows = tuple(range(1, wanted.ndim))
        size = np.maximum(
            size.reshape(-1, *[1] * len(rows)), np.abs(wanted).max(rows, keepdims=True)
        )
    assert (np.abs(found - wanted) <= TOLERANCE * size).all(), np.max(np.abs(found - wanted) / size)


def assert_same_gradients(
    checkpoint: ChronosCheckpoint, gradients: dict[str, jax.Array], wanted: dict[str, np.ndarray]
) -> None:
    """Norms and entries of all gradients, by our paths, are those recorded, by tensors' names."""
    tensors = {}
    for path, gradient in gradients.items():
        plan = checkpoint.plans[path]
        layers = plan.parameter.layers
        for number, layer in enumerate(layers or [None]):
            part = np.asarray(gradient if layer is None else gradient[number])
            order = [plan.parameter.axes.index(axis) for axis in plan.axes]
            tensors[plan.tensor(layer, None, None)] = part.transpose(order).reshape(plan.shape)
    ordered = [tensors[name] for name in sorted(tensors)]
    assert_close([np.linalg.norm(part) for part in ordered], wanted["norms"])
    assert_close(np.stack([sample(part) for part in ordered]), wanted["entries"])
