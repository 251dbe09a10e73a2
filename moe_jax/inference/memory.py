"""Whether a model's weights fit, said before any of them is read, and by `moe-jax inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moe_jax.errors import UserError
from moe_jax.models.paths import ParameterPath
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.parallel.sharding import named
from moe_jax.profiling.memory import per_device
from moe_jax.runtime import metal
from moe_jax.runtime.platform import default_platform, platform_of
from moe_jax.utils.units import gibibytes, one_of_these

CGROUP = Path("/sys/fs/cgroup")  # where a container's limit stands


class WeightMemory(NamedTuple):
    """What a model's weights need before a text is read, beside what there is for them."""

    needed: int
    free: int | None
    """None where the platform does not tell."""
    shared: bool
    """Both are of all devices together, which are simulated in one machine's memory."""

    @property
    def fits(self) -> bool:
        """Whether they fit, as far as is known."""
        return self.free is None or self.needed <= self.free


def device_bytes(plan: ServingPlan, expert_cache: int | None = None) -> dict[jax.Device, int]:
    """Bytes of weights that each device of the mesh holds, with `expert_cache` experts per layer if
    not all of its own.
    """
    return dict.fromkeys(plan.mesh.devices.flat, _bytes_per_device(plan, expert_cache))


def weight_bytes_per_device(plan: ServingPlan, path: str) -> int:
    """Bytes of a parameter that each device of the mesh holds."""
    weight = plan.weights[path]
    return per_device(weight.abstract(), named(plan.mesh, weight.held_spec()))


def weight_memory(
    plan: ServingPlan,
    memory: int | None = None,
    *,
    packs: bool = False,
    expert_cache: int | None = None,
) -> WeightMemory:
    """What the weights of a plan, whose mesh may be abstract, need; and `memory` bytes per device,
    or what this machine has.

    With `packs` they are read as f32 masters first, which may be more. With an `expert_cache` the
    device holds that many experts per layer and the host all of them. The cache of keys is not
    counted: it grows with the text.
    """
    needed = _bytes_per_device(plan, expert_cache)
    if packs:
        needed = max(needed, _master_bytes(plan))
    if memory is not None:
        return WeightMemory(needed, memory, shared=False)
    device = jax.local_devices()[0]
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return WeightMemory(needed, statistics["bytes_limit"], shared=False)
    platform = platform_of(device)
    if platform.one_device and not platform.simulated:
        return WeightMemory(needed, metal.gpu_memory(), shared=False)
    if sys.platform != "linux" or not platform.simulated:
        return WeightMemory(needed, None, shared=False)
    on_host = 0 if expert_cache is None else plan.expert_bytes()
    return WeightMemory(needed * plan.mesh.size + on_host, _free_memory(), shared=True)


def check_weight_memory(
    plan: ServingPlan,
    memory: int | None,
    *,
    packs: bool = False,
    converted: bool = False,
    expert_cache: int | None = None,
) -> None:
    """Refuses a model whose weights do not fit, before any of them is read; arguments as those of
    `weight_memory`. What was `converted` keeps its types.
    """
    room = weight_memory(plan, memory, packs=packs, expert_cache=expert_cache)
    if room.fits:
        return
    assert room.free is not None
    where = "in all" if room.shared and plan.mesh.size > 1 else "on each device"
    allowed = "there are" if memory is None else "--memory allows"
    masters = packs and _master_bytes(plan) > _bytes_per_device(plan, expert_cache)
    remedies = [
        *_smaller_weights(plan, masters=masters, converted=converted),
        *_elsewhere(plan, shared=room.shared, masters=masters, expert_cache=expert_cache),
        *(() if memory is None else ("a larger --memory",)),
    ]
    raise UserError(
        f"The weights take {gibibytes(room.needed)} {where} and {allowed} {gibibytes(room.free)}: "
        f"use {one_of_these(remedies or ['a machine with more memory'])}."
    )


def _smaller_weights(plan: ServingPlan, *, masters: bool, converted: bool) -> list[str]:
    """Ways to hold the weights in less, of those that were not taken already."""
    if masters:  # whatever they are packed into afterwards
        return ["the folder that `moe-jax export` makes of the run, which is read in parts"]
    quantize = ["--quantize int4"] if plan.quantization != "int4" else []
    if converted:
        return [f"the model converted again with {option}" for option in quantize]
    return quantize + (["--dtype bfloat16"] if plan.dtype == jnp.float32 else [])


def _elsewhere(
    plan: ServingPlan, *, shared: bool, masters: bool, expert_cache: int | None
) -> list[str]:
    """Ways to hold less of the weights on a device."""
    if shared:  # which more simulated devices do not change, and a second copy makes worse
        return ["no --expert-cache-size"] if expert_cache is not None else []
    size = plan.mesh.size
    ways = [f"a --mesh with more {f'than {size} ' if size > 1 else ''}devices"]
    if default_platform().one_device:
        ways = []
    if size > 1 or masters or not plan.expert_bytes():
        return ways
    if expert_cache is None:
        return ["--expert-cache-size", *ways]
    # A token's own experts are the least that it can keep.
    return ["a smaller --expert-cache-size"] if expert_cache > plan.moe.top_k else []


def _bytes_per_device(plan: ServingPlan, expert_cache: int | None) -> int:
    """Bytes of weights that each device of the mesh holds."""
    share = 1.0 if expert_cache is None else min(1.0, expert_cache / plan.placement.num_slots)
    held = 0
    for path in plan.weights:
        size = weight_bytes_per_device(plan, path)
        held += round(size * share) if ParameterPath.parse(path).is_expert else size
    return held


def _master_bytes(plan: ServingPlan) -> int:
    """Bytes of f32 masters that each device holds while they are packed."""
    weights = plan.weights.values()
    return per_device(
        [jax.ShapeDtypeStruct(weight.shape, jnp.float32) for weight in weights],
        [NamedSharding(plan.mesh, weight.spec) for weight in weights],
    )


def _free_memory() -> int:
    """Bytes that this machine, or the container that this process is in, can still give."""
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
