"""Whether the caches of a server fit beside the weights, said before any weight is read."""

from __future__ import annotations

from moe_jax.errors import UserError
from moe_jax.inference.kv_cache import CacheLayout
from moe_jax.inference.memory import weight_memory
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.serving.device_state import EngineSize, cache_bytes
from moe_jax.utils.units import gibibytes


def check_room(
    plan: ServingPlan, size: EngineSize, memory: int | None, expert_cache: int | None = None
) -> None:
    """Raises UserError where weights and caches together do not fit; `memory` and `expert_cache` as
    those of `weight_memory`.
    """
    room = weight_memory(plan, memory, expert_cache=expert_cache)
    caches = cache_bytes(CacheLayout(plan), size) * (plan.mesh.size if room.shared else 1)
    if room.free is None or room.needed + caches <= room.free:
        return
    where = "in all" if room.shared and plan.mesh.size > 1 else "on each device"
    allowed = "there are" if memory is None else "--memory allows"
    raise UserError(
        f"--max-batch {size.max_batch} and --max-context {size.context} need {gibibytes(caches)} "
        f"for keys and values {where}, beside {gibibytes(room.needed)} of weights, and {allowed} "
        f"{gibibytes(room.free)}: lower one of the two."
    )
