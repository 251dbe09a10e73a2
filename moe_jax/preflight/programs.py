"""The programs that a run compiles, before they are compiled: those of `training/trainer.py` for
the devices of a target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.checkpoint import integrity, orbax_io
from moe_jax.config.schema import Config
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.models.batch import AnyBatch, Batch, SeriesBatch
from moe_jax.models.paths import path_of
from moe_jax.parallel.mesh import make_mesh
from moe_jax.preflight.chips import Target
from moe_jax.profiling.flops import TRAINING, model_flops, sequence_tokens
from moe_jax.profiling.memory import per_device
from moe_jax.training import initial_state
from moe_jax.training.placement.initial import mesh_topology
from moe_jax.training.placement.migration import Migration
from moe_jax.training.step import TrainProgram
from moe_jax.training.trainer import make_program

INITIAL_STATE, TRAIN_STEP, EVALUATION = "initial_state", "train_step", "evaluation"
CHECKSUM, SLOT_CHECKSUMS = "checkpoint_checksum", "checkpoint_slot_checksums"
MIGRATION = "migration"


class Planned(NamedTuple):
    """A program that has not been compiled."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    resident_bytes: int  # what else lies on each device while it runs
    flops: float  # that the model needs at least, on each device


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
    length = sequence_tokens(program.model, config.train.seq_len)
    tokens = config.train.global_batch * length / program.mesh.size
    forward = tokens * model_flops(
        program.model, program.moe, program.vocab_size, config.train.seq_len
    )
    return [
        Planned(INITIAL_STATE, lambda: program.init_state.lower(seed), 0, 0),
        Planned(TRAIN_STEP, lambda: program.train_step.lower(state, batch), 0, TRAINING * forward),
        Planned(
            EVALUATION,
            lambda: program.eval_step.lower(state.params, state.tables, batch),
            held - used,
            forward,
        ),
        *_checksums(state, held),
        *_migration(config, program, state, held),
    ]


def _checksums(state: Any, held: int) -> list[Planned]:
    """What a checkpoint's checksums compile for the largest arrays: one of the whole array, and
    one of each slot of an expert. Both run when it is saved and when it is restored, where slots
    may be laid out in another order: that is done by the reads.
    """
    arrays = orbax_io.flatten(state)
    slotted = {name: a for name, a in arrays.items() if orbax_io.has_slots(name, a.ndim)}
    planned = []
    whole = [array for name, array in arrays.items() if name not in slotted]
    if whole:
        largest = max(whole, key=_share)
        planned.append(
            Planned(
                CHECKSUM,
                lambda: integrity.array_checksum.lower(largest),
                held - _share(largest),
                0,
            )
        )
    if slotted:
        bank = max(slotted.values(), key=_share)
        planned.append(
            Planned(
                SLOT_CHECKSUMS,
                lambda: integrity.lower_slot_checksums(bank),
                held - _share(bank),
                0,
            )
        )
    return planned


def _migration(config: Config, program: TrainProgram, state: Any, held: int) -> list[Planned]:
    """What moves experts, where they may move."""
    ranks = program.placement.ranks
    if not config.placement.replan_every or ranks == 1 or not program.has_moe:
        return []
    migration = Migration(program)
    arrays = {path_of(keys).text: leaf for keys, leaf in jax.tree.leaves_with_path(state)}
    banks = {path: arrays[path] for path in migration.paths}
    slots_LP = program.placement.physical_to_logical
    # Any other table: what moves is data, and the program is the same.
    other = dataclasses.replace(program.placement, physical_to_logical=slots_LP[:, ::-1])
    call = migration.plan(program.placement, other).calls[0]
    rest = held - sum(map(_share, banks.values()))
    return [Planned(MIGRATION, lambda: migration.run.lower(banks, call), rest, 0)]


def _share(array: Any) -> int:
    """Bytes of an array on each device."""
    return per_device(array, array.sharding)


def _abstract_batch(program: TrainProgram, rows: int, length: int) -> AnyBatch:
    """The shapes of a batch as `TrainProgram.shard` makes it."""

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=program.batch_sharding)

    forecast = program.model.forecast
    if program.model.forecasts:
        sizes = (forecast.context_length, forecast.prediction_length)
        context, target = (array(rows, size, dtype=jnp.float32) for size in sizes)
        return SeriesBatch(context, target, array(rows))
    tokens = array(rows, length)
    mask = array(rows, length, dtype=jnp.float32)
    return Batch(tokens, tokens, tokens, tokens, mask, array(rows))


def _placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
