"""Bytes on a device: of arrays by their shardings, of a state, of a compiled program."""

from __future__ import annotations

import math
from typing import Any

import jax

from moe_jax.models.paths import path_of

DEVICE_BYTE_KINDS = ("dense_parameters", "expert_parameters", "dense_optimizer", "expert_optimizer")


def per_device(shapes: Any, shardings: Any) -> int:
    """Bytes that each device of a mesh holds of arrays with these shapes, dtypes and shardings."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array, sharding in pairs
    )


def bytes_per_device(state: Any) -> dict[str, dict[str, int]]:
    """Bytes of parameters and optimizer state, dense and expert, that each of this process's
    devices holds.
    """
    held: dict[int, dict[str, int]] = {}
    for group, whose in (("params", "parameters"), ("opt_state", "optimizer")):
        for keys, array in jax.tree.leaves_with_path(getattr(state, group)):
            kind = f"{'expert' if path_of(keys).is_expert else 'dense'}_{whose}"
            size = per_device(array, array.sharding)
            for device in array.sharding.addressable_devices:
                kinds = held.setdefault(device.id, dict.fromkeys(DEVICE_BYTE_KINDS, 0))
                kinds[kind] += size
    return {str(device): held[device] for device in sorted(held)}


def compiled_bytes(compiled: Any) -> dict[str, int]:
    """Bytes per device of a compiled function's arguments, results and temporaries; donated
    arguments are in both first.
    """
    sizes = compiled.memory_analysis()
    return {
        "argument_bytes": sizes.argument_size_in_bytes,
        "output_bytes": sizes.output_size_in_bytes,
        "temp_bytes": sizes.temp_size_in_bytes,
    }
