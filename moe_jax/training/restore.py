"""A run's checkpoint as the training state on any mesh."""

from __future__ import annotations

from typing import Any

import jax

from moe_jax.checkpoint.expert_layout import adapt_to
from moe_jax.checkpoint.manager import Checkpoints, Restored
from moe_jax.moe.tables import LayerTables
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram


def restore_state(
    checkpoints: Checkpoints, program: TrainProgram, *, step: int | None, fallback: bool
) -> Restored:
    """The whole training state on the program's mesh, tables and slots as its placement says;
    arguments as for `restore_latest`.
    """
    found = checkpoints.restore_latest(
        _target(program),
        adapt_to(program.model, program.moe, program.placement),
        step=step,
        fallback=fallback,
        subset=True,
    )
    return found._replace(state=program.with_tables(found.state, program.placement))


def _target(program: TrainProgram) -> TrainState:
    """What is read: all but the tables that follow from the placement."""
    target = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        program.abstract_state,
        program.state_shardings,
    )
    nothing: Any = None  # in the place of an array: not read
    return target._replace(
        tables=LayerTables(nothing, nothing, nothing, target.tables.bias_E), expert_LP=nothing
    )
