"""The programs that a run compiles, before they are compiled: those of `training/trainer.py` for
the devices of a target.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.schema import Config
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.models.batch import Batch
from moe_jax.parallel.mesh import make_mesh
from moe_jax.preflight.chips import Target
from moe_jax.profiling.memory import per_device
from moe_jax.training import initial_state
from moe_jax.training.placement.initial import mesh_topology
from moe_jax.training.step import TrainProgram
from moe_jax.training.trainer import make_program

INITIAL_STATE, TRAIN_STEP, EVALUATION = "initial_state", "train_step", "evaluation"


class Planned(NamedTuple):
    """A program that has not been compiled."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    resident_bytes: int  # what else lies on each device while it runs


def training_program(config: Config, target: Target) -> TrainProgram:
    """The run's own program on the target's devices. Raises UserError for what the run itself would
    refuse, and for a mesh of another number of devices.
    """
    origin = initial_state.Origin(config, Path())
    config = initial_state.resolve(config, Path(), origin, resume=False)
    mesh, count = config.mesh, len(target.devices)
    if mesh.size != count:
        raise UserError(
            f"mesh.data={mesh.data} x mesh.expert={mesh.expert} x mesh.tensor={mesh.tensor} is "
            f"{mesh.size} devices and --topology {target.topology} has {count}: set a mesh of "
            f"{count}, such as --set mesh.data={_data_for(mesh.expert * mesh.tensor, count)}."
        )
    devices = make_mesh(mesh, target.devices)
    size = config.model.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
    topology = mesh_topology(config, devices)
    return make_program(config, size, devices, topology, saved=None)


def _data_for(inner: int, count: int) -> str:
    """What mesh.data would have to be, as text, where the other axes divide the devices."""
    return str(count // inner) if count % inner == 0 else f"{count} --set mesh.expert=1"


def training_programs(config: Config, program: TrainProgram) -> list[Planned]:
    """What a training run compiles."""
    state = jax.tree.map(_placed, program.abstract_state, program.state_shardings)
    batch = _abstract_batch(program, config.train.global_batch, config.train.seq_len)
    held = per_device(program.abstract_state, program.state_shardings)
    used = per_device(
        (program.abstract_state.params, program.abstract_state.tables),
        (program.state_shardings.params, program.state_shardings.tables),
    )
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    return [
        Planned(INITIAL_STATE, lambda: program.init_state.lower(seed), 0),
        Planned(TRAIN_STEP, lambda: program.train_step.lower(state, batch), 0),
        Planned(
            EVALUATION,
            lambda: program.eval_step.lower(state.params, state.tables, batch),
            held - used,
        ),
    ]


def _abstract_batch(program: TrainProgram, rows: int, length: int) -> Batch:
    """The shapes of a batch as `TrainProgram.shard` makes it."""

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=program.batch_sharding)

    tokens = array(rows, length)
    mask = array(rows, length, dtype=jnp.float32)
    return Batch(tokens, tokens, tokens, tokens, mask, array(rows))


def _placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
