"""A run's checkpoint as weights to serve on any mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.checkpoint.expert_layout import sources_for
from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.paths import nested
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.placement.table import Placement, contiguous


def serving_placement(saved: Placement, ranks: int, redundant_slots: int = 0) -> Placement:
    """The table to serve by: experts as they lie in the checkpoint where they fill as many slots,
    else the contiguous one, with redundant slots on each rank if asked for.
    """
    layers, experts = saved.physical_to_logical.shape[0], saved.num_experts
    contiguous_table = contiguous(layers, experts, ranks, redundant_slots)
    return (
        Placement(saved.physical_to_logical, experts, ranks)
        if saved.num_slots == contiguous_table.num_slots == experts
        else contiguous_table
    )


def restore_model(
    checkpoints: Checkpoints, plan: ServingPlan, *, step: int | None, fallback: bool
) -> tuple[Any, jax.Array]:
    """Training parameters in the plan's slots, cut over its mesh, and the selection bias [L,
    E].
    """

    def shape(leaf):
        return jax.ShapeDtypeStruct(
            leaf.shape, jnp.float32, sharding=NamedSharding(plan.mesh, leaf.spec)
        )

    params = nested({path: shape(leaf) for path, leaf in plan.weights.items()})
    whole = NamedSharding(plan.mesh, PartitionSpec())
    bias = jax.ShapeDtypeStruct(
        (count_moe_layers(plan.model, plan.moe), plan.moe.num_experts),
        jnp.float32,
        sharding=whole,
    )
    target = {"params": params, "tables": {"bias_E": bias}}
    restored = checkpoints.restore_latest(
        target,
        sources_for(plan.model, plan.moe, plan.placement),
        step=step,
        fallback=fallback,
        subset=True,
    )
    return restored.state["params"], restored.state["tables"]["bias_E"]
