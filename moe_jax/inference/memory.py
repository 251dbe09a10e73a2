"""Whether a model's weights fit, said before any of them is read."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moe_jax.errors import UserError
from moe_jax.models.paths import ParameterPath
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.parallel.sharding import named
from moe_jax.profiling.memory import per_device
from moe_jax.runtime.platform import platform_of

CGROUP = Path("/sys/fs/cgroup")  # where a container's limit stands


def device_bytes(plan: ServingPlan, expert_cache: int | None = None) -> dict[jax.Device, int]:
    """Bytes of weights that each device of the mesh holds, with `expert_cache` experts per layer if
    not all of its own.
    """
    held = dict.fromkeys(plan.mesh.devices.flat, 0)
    share = 1.0 if expert_cache is None else min(1.0, expert_cache / plan.placement.num_slots)
    for path in plan.weights:
        size = weight_bytes_per_device(plan, path)
        size = round(size * share) if ParameterPath.parse(path).is_expert else size
        for device in held:
            held[device] += size
    return held


def weight_bytes_per_device(plan: ServingPlan, path: str) -> int:
    """Bytes of a parameter that each device of the mesh holds."""
    weight = plan.weights[path]
    return per_device(weight.abstract(), named(plan.mesh, weight.held_spec()))


def check_weight_memory(
    plan: ServingPlan, memory: int | None, *, packs: bool = False, expert_cache: int | None = None
) -> None:
    """Refuses a model whose weights do not fit, before any of them is read: in `memory` bytes per
    device, or in what there is.

    With `packs` they are read as f32 masters first, which may be more. With an `expert_cache` the
    device holds that many experts per layer and the host all of them. The cache of keys is not
    counted: it grows with the text.
    """
    held = device_bytes(plan, expert_cache)
    if packs:
        weights = plan.weights.values()
        masters = per_device(
            [jax.ShapeDtypeStruct(weight.shape, jnp.float32) for weight in weights],
            [NamedSharding(plan.mesh, weight.spec) for weight in weights],
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
                needed += plan.expert_bytes()
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
