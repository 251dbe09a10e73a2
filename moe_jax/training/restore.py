"""A run's checkpoint as the training state on any mesh."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from moe_jax.checkpoint.expert_layout import saved_meta, sources_for
from moe_jax.checkpoint.manager import Checkpoints, Restored
from moe_jax.moe.tables import LayerTables
from moe_jax.placement.table import Placement
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram


class SavedRun(NamedTuple):
    """A run's newest checkpoint, its arrays not read yet."""

    step: int
    meta: dict[str, Any]
    placement: Placement  # where its experts are


def find_saved(checkpoints: Checkpoints, fallback: bool) -> SavedRun | None:
    """The newest readable checkpoint; None without checkpoints. Raises CorruptCheckpoint as
    `saved_meta` does.
    """
    saved = saved_meta(checkpoints, None, fallback)
    if saved is None:
        return None
    step, meta = saved
    return SavedRun(step, meta, Placement.from_json(meta["placement"]))


def restore_state(
    checkpoints: Checkpoints,
    program: TrainProgram,
    *,
    step: int | None,
    fallback: bool,
    known: SavedRun | None = None,
) -> Restored:
    """The whole training state on the program's mesh, tables and slots as its placement says;
    arguments as for `restore_latest`.
    """
    restored = checkpoints.restore_latest(
        _target(program),
        sources_for(program.model, program.moe, program.placement),
        step=step,
        fallback=fallback,
        subset=True,
        known=None if known is None else (known.step, known.meta),
    )
    return restored._replace(state=program.with_tables(restored.state, program.placement))


def _target(program: TrainProgram) -> TrainState:
    """What is read: everything except the tables that follow from the placement."""
    target = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        program.abstract_state,
        program.state_shardings,
    )
    nothing: Any = None  # in the place of an array: not read
    return target._replace(
        tables=LayerTables(nothing, nothing, nothing, target.tables.bias_E), expert_LP=nothing
    )
