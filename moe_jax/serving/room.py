"""What a server needs of a model and its mesh, looked at before any weight is read: room for the
caches beside the weights, and experts that can move where they are to.
"""

from __future__ import annotations

from moe_jax.errors import UserError
from moe_jax.inference.memory import weight_memory
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.serving.device_state import cache_bytes
from moe_jax.serving.engine_size import EngineSize, check_served
from moe_jax.utils.units import gibibytes


def check_room(
    plan: ServingPlan, size: EngineSize, memory: int | None, expert_cache: int | None = None
) -> None:
    """Raises UserError where the model cannot be served so, or weights and cache together do not
    fit; `memory` and `expert_cache` as those of `weight_memory`.
    """
    check_served(plan, size)
    room = weight_memory(plan, memory, expert_cache=expert_cache)
    caches = cache_bytes(plan, size) * (plan.mesh.size if room.shared else 1)
    if room.free is None or room.needed + caches <= room.free:
        return
    where = "in all" if room.shared and plan.mesh.size > 1 else "on each device"
    allowed = "there are" if memory is None else "--memory allows"
    tokens = (size.full_blocks - 1) * size.block
    fitting = int(tokens * max(0, room.free - room.needed) / caches)
    remedy = "lower --max-context"
    if fitting > size.context:
        remedy = f"give --cache-tokens {fitting // 1000 * 1000 or fitting}"
    raise UserError(
        f"--max-batch {size.max_batch} and --max-context {size.context} need {gibibytes(caches)} "
        f"for keys and values of {tokens} tokens {where}, beside {gibibytes(room.needed)} of "
        f"weights, and {allowed} {gibibytes(room.free)}: {remedy}, or lower --max-batch."
    )


def check_moves(plan: ServingPlan, option: str, expert_cache: int | None) -> None:
    """Raises UserError for an option that moves experts between devices where they cannot."""
    if expert_cache is not None:
        raise UserError(
            f"{option} moves experts between devices, and with --expert-cache-size they are in the "
            f"host's memory: leave one of the two out."
        )
    if not len(plan.placement.physical_to_logical):
        raise UserError(f"{option} moves experts, and the model has none: leave it out.")
    if plan.placement.ranks == 1:
        raise UserError(
            f"{option} moves experts between devices, and all are on one: leave it out, or give "
            f"--mesh expert=N."
        )
