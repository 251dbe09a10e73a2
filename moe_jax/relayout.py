"""Opening a run's checkpoint on another mesh: experts keep their weights and moments, slots are laid out anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.checkpoint import Adapt, Checkpoints, Restored
from moe_jax.engine import Engine
from moe_jax.errors import CorruptCheckpoint
from moe_jax.model import count_moe_layers, expert_layers
from moe_jax.moe.layer import LayerTables
from moe_jax.placement.table import Placement, contiguous, slot_sources
from moe_jax.schema import ModelConfig, MoEConfig
from moe_jax.slots import EXPERTS, take_slots
from moe_jax.step import Program, TrainState


def serving_placement(saved: Placement, ranks: int) -> Placement:
    """The table to serve by: experts as they lie in the checkpoint where they fill as many slots, else the contiguous one."""
    layers, experts = saved.physical_to_logical.shape[0], saved.num_experts
    fresh = contiguous(layers, experts, ranks)
    return Placement(saved.physical_to_logical, experts, ranks) if saved.num_slots == fresh.num_slots == experts else fresh


def saved_placement(checkpoints: Checkpoints, step: int | None, fallback: bool) -> Placement | None:
    """The table of the newest readable checkpoint, as `saved_meta` finds it."""
    meta = saved_meta(checkpoints, step, fallback)
    return None if meta is None else Placement.from_json(meta["placement"])


def saved_meta(checkpoints: Checkpoints, step: int | None, fallback: bool) -> dict[str, Any] | None:
    """What the newest readable checkpoint (of `step`, if given) holds besides arrays; None without checkpoints.

    Raises CorruptCheckpoint where the first one tried is damaged and `fallback` is not set, or all are.
    """
    damage = None
    for candidate in reversed(checkpoints.steps()):
        if step is not None and candidate > step:
            continue
        try:
            return checkpoints.read_meta(candidate)
        except CorruptCheckpoint as error:
            if not fallback:
                raise
            damage = error
    if damage is not None:
        raise damage
    return None


def restore(checkpoints: Checkpoints, program: Program, *, step: int | None, fallback: bool) -> Restored:
    """The whole training state on the program's mesh, tables and slots as its placement says; arguments as for `restore_latest`."""
    found = checkpoints.restore_latest(_target(program), _adapt_to(program), step=step, fallback=fallback, partial=True)
    return found._replace(state=program.with_tables(found.state, program.placement))


def restore_model(checkpoints: Checkpoints, engine: Engine, *, step: int | None, fallback: bool) -> tuple[Any, jax.Array]:
    """Training parameters in the engine's slots, cut over its mesh, and the selection bias [L, E]."""
    shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=NamedSharding(engine.mesh, leaf.spec))  # noqa: E731
    params = engine.tree({path: shape(leaf) for path, leaf in engine.leaves.items()})
    whole = NamedSharding(engine.mesh, PartitionSpec())
    bias = jax.ShapeDtypeStruct((count_moe_layers(engine.model, engine.moe), engine.moe.num_experts), jnp.float32, sharding=whole)
    target = {"params": params, "tables": {"bias_E": bias}}
    found = checkpoints.restore_latest(target, _adapt_to(engine), step=step, fallback=fallback, partial=True)
    return found.state["params"], found.state["tables"]["bias_E"]


def _target(program: Program) -> TrainState:
    """What is read: all but the tables that follow from the placement."""
    target = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        program.abstract_state,
        program.state_shardings,
    )
    nothing: Any = None  # in the place of an array: not read
    return target._replace(tables=LayerTables(nothing, nothing, nothing, target.tables.bias_E), expert_LP=nothing)


def _adapt_to(to: Program | Engine) -> Callable[[dict[str, Any]], Adapt]:
    """From the meta of each checkpoint tried, how its own table's experts come into the slots of `to`."""
    return lambda meta: adapter(to.model, to.moe, Placement.from_json(meta["placement"]), to.placement)


def adapter(model: ModelConfig, moe: MoEConfig, old: Placement, new: Placement) -> Adapt:
    """Expert arrays [repeats, P, ...] of one table for another; none is touched where both say the same."""
    same = np.array_equal(old.physical_to_logical, new.physical_to_logical)
    sources_LP = slot_sources(old, new)
    layers = expert_layers(model, moe)

    def change(path: str, array: jax.Array) -> jax.Array:
        found = EXPERTS.search(path)
        assert found is not None, path
        if array.ndim < 2:  # a placeholder of adafactor's
            return array
        rows = np.array(layers[int(found[1]), int(found[2])])
        return take_slots(array, sources_LP[rows])

    return Adapt(lambda path: not same and EXPERTS.search(path) is not None, change)
