"""A run's checkpoint as weights to serve on any mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.checkpoint.expert_layout import adapt_to
from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.inference.engine import Engine
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.placement.table import Placement, contiguous


def serving_placement(saved: Placement, ranks: int) -> Placement:
    """The table to serve by: experts as they lie in the checkpoint where they fill as many slots,
    else the contiguous one.
    """
    layers, experts = saved.physical_to_logical.shape[0], saved.num_experts
    fresh = contiguous(layers, experts, ranks)
    return (
        Placement(saved.physical_to_logical, experts, ranks)
        if saved.num_slots == fresh.num_slots == experts
        else fresh
    )


def restore_model(
    checkpoints: Checkpoints, engine: Engine, *, step: int | None, fallback: bool
) -> tuple[Any, jax.Array]:
    """Training parameters in the engine's slots, cut over its mesh, and the selection bias [L,
    E].
    """

    def shape(leaf):
        return jax.ShapeDtypeStruct(
            leaf.shape, jnp.float32, sharding=NamedSharding(engine.mesh, leaf.spec)
        )

    params = engine.tree({path: shape(leaf) for path, leaf in engine.plans.items()})
    whole = NamedSharding(engine.mesh, PartitionSpec())
    bias = jax.ShapeDtypeStruct(
        (count_moe_layers(engine.model, engine.moe), engine.moe.num_experts),
        jnp.float32,
        sharding=whole,
    )
    target = {"params": params, "tables": {"bias_E": bias}}
    found = checkpoints.restore_latest(
        target,
        adapt_to(engine.model, engine.moe, engine.placement),
        step=step,
        fallback=fallback,
        subset=True,
    )
    return found.state["params"], found.state["tables"]["bias_E"]
