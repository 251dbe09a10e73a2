"""Whether a model's weights fit, said before any of them is read."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moe_jax.errors import UserError
from moe_jax.inference.engine import Engine
from moe_jax.models.paths import ParameterPath
from moe_jax.models.weight_layout import bytes_of
from moe_jax.parallel.sharding import named
from moe_jax.profiling.memory import per_device
from moe_jax.runtime.platform import platform_of

CGROUP = Path("/sys/fs/cgroup")  # where a container's limit stands


def device_bytes(engine: Engine, expert_cache: int | None = None) -> dict[jax.Device, int]:
    """Bytes of weights that each device of the mesh holds, where it keeps `expert_cache` experts a
    layer if not all of its own.
    """
    held = dict.fromkeys(engine.mesh.devices.flat, 0)
    share = 1.0 if expert_cache is None else min(1.0, expert_cache / engine.placement.num_slots)
    for path, plan in engine.plans.items():
        arrays = jax.tree.leaves(plan.abstract())
        shardings = jax.tree.leaves(named(engine.mesh, plan.held_spec()))
        for array, sharding in zip(arrays, shardings, strict=True):
            size = per_device(array, sharding)
            size = round(size * share) if ParameterPath.parse(path).is_expert else size
            for device in held:
                held[device] += size
    return held


def check_weight_memory(
    engine: Engine, memory: int | None, *, packs: bool = False, expert_cache: int | None = None
) -> None:
    """Refuses a model whose weights do not fit, before any of them is read: in `memory` bytes a
    device, or in what there is.

    With `packs` they are read as f32 masters first, which may be more. With an `expert_cache` the
    device holds that many experts a layer and the host all of them. The cache of keys is not
    counted: it grows with the text.
    """
    held = device_bytes(engine, expert_cache)
    if packs:
        plans = engine.plans.values()
        masters = per_device(
            [jax.ShapeDtypeStruct(plan.shape, jnp.float32) for plan in plans],
            [NamedSharding(engine.mesh, plan.spec) for plan in plans],
        )
        held = {device: max(size, masters) for device, size in held.items()}
    needed = max(held.values())
    free = memory
    if free is None:
        device = jax.local_devices()[0]
        statistics = device.memory_stats() or {}
        if "bytes_limit" in statistics:
            free = statistics["bytes_limit"]
        elif (
            sys.platform == "linux" and platform_of(device).simulated
        ):  # simulated devices share the machine's memory
            free = _free_memory()
            needed = sum(held.values())
            if expert_cache is not None:
                needed += sum(
                    bytes_of(leaf) for path, leaf in engine.plans.items() if "/experts/" in path
                )
    if free is not None and needed > free:
        where = "in all" if needed > max(held.values()) else "on each device"
        raise UserError(
            f"The weights take {needed / 2**30:.1f} GiB {where} and there are {free / 2**30:.1f} "
            f"GiB: use --quantize int4, "
            "--dtype bfloat16 or a --mesh with more devices."
        )


def _free_memory() -> int:
    """Bytes that this machine, or the container that this process is in, can still give."""
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
