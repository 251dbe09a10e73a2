"""Bytes on a device: of arrays, of a compiled program."""

from __future__ import annotations

from typing import Any

import jax


def bytes_per_device(state: Any) -> dict[str, dict[str, int]]:
    """Bytes of parameters and optimizer state, dense and expert, that each of this process's
    devices holds.
    """
    held: dict[int, dict[str, int]] = {}
    for group in ("params", "opt_state"):
        for path, leaf in jax.tree.leaves_with_path(getattr(state, group)):
            expert = any(getattr(entry, "key", None) == "experts" for entry in path)
            kind = ("expert_" if expert else "dense_") + (
                "parameters" if group == "params" else "optimizer"
            )
            for shard in leaf.addressable_shards:
                kinds = held.setdefault(shard.device.id, dict.fromkeys(DEVICE_BYTE_KINDS, 0))
                kinds[kind] += shard.data.nbytes
    return {str(device): held[device] for device in sorted(held)}


DEVICE_BYTE_KINDS = ("dense_parameters", "expert_parameters", "dense_optimizer", "expert_optimizer")


def compiled_bytes(compiled: Any) -> dict[str, int]:
    """Bytes a device of a compiled function's arguments, results and temporaries; donated arguments
    are in both first.
    """
    sizes = compiled.memory_analysis()
    return {
        "argument_bytes": sizes.argument_size_in_bytes,
        "output_bytes": sizes.output_size_in_bytes,
        "temp_bytes": sizes.temp_size_in_bytes,
    }
