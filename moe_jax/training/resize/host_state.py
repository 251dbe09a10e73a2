"""A run's state as named arrays on the host, read from its checkpoint; and a new run written from
such arrays.

Between the two the number of experts may change (resize.py, expert_arrays.py). Experts lie in
logical order in what is written, on one rank; a mesh's own slots are laid out when the run is
resumed there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.checkpoint import expert_layout, orbax_io
from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.config.load import dump_config
from moe_jax.config.schema import Config, MeshConfig
from moe_jax.errors import UserError
from moe_jax.model_io.source import find
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous
from moe_jax.runtime.platform import host_device
from moe_jax.tracking import environment, run_dir
from moe_jax.tracking.metrics import FILE_NAME, MetricsWriter, iter_metrics
from moe_jax.tracking.traffic import RUN_FILE, read_measured
from moe_jax.training import initial_state, restore
from moe_jax.training.step import TrainProgram
from moe_jax.utils.files import new_folder

LINES = 20  # newest training lines whose loads are summed
COUNTERS = ("step", "seed", "skipped", "skipped_in_row")  # of TrainState


class RunArrays(NamedTuple):
    """A state on the host."""

    arrays: dict[
        str, np.ndarray
    ]  # by names such as `params/embedding` and `opt_state/0/mu/embedding`
    bias_LE: np.ndarray | None  # the routers' balance bias; None is zeros
    counters: dict[str, int]
    meta: dict[
        str, Any
    ]  # what a checkpoint holds besides arrays; `config` and `placement` are replaced
    vocab_size: int
    tokenizer: str  # what `load_tokenizer` takes


class Load(NamedTuple):
    """How busy a run's experts were."""

    count_LE: np.ndarray  # float64, choices by logical expert
    origin: str  # in words


def host_program(config: Config, vocab_size: int) -> TrainProgram:
    """The run's program on one CPU device, experts in logical order, one slot each; nothing is
    compiled.
    """
    mesh = make_mesh(MeshConfig(), [host_device()])
    placement = contiguous(count_moe_layers(config.model, config.moe), config.moe.num_experts, 1)
    return TrainProgram(
        config.model,
        config.moe,
        config.optimizer,
        mesh,
        placement,
        vocab_size=vocab_size,
        steps=config.train.steps,
    )


def read_run(run: Path, config: Config, *, step: int | None, fallback: bool) -> RunArrays:
    """The newest checkpoint of a run, or that of `step`. Raises UserError where there is none,
    CorruptCheckpoint for a damaged one.
    """
    checkpoints = Checkpoints(
        run / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best
    )
    expert_layout.saved_placement(checkpoints, step, fallback)  # refuses a run without any
    described = find(run).describe()
    program = host_program(config, described.vocab_size)
    restored = restore.restore_state(checkpoints, program, step=step, fallback=fallback)
    state = restored.state
    arrays = {name: np.asarray(leaf) for name, leaf in _flat(state.params, state.opt_state).items()}
    counters = {name: int(getattr(state, name)) for name in COUNTERS}
    meta = {
        key: value for key, value in restored.meta.items() if key != "replanning"
    }  # traffic of experts that will be others
    return RunArrays(
        arrays,
        np.asarray(state.tables.bias_E),
        counters,
        meta,
        described.vocab_size,
        described.tokenizer,
    )


def array_shapes(program: TrainProgram) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a program's parameters and moments."""
    state = program.abstract_state
    return {name: leaf.shape for name, leaf in _flat(state.params, state.opt_state).items()}


def _flat(params: Any, opt_state: Any) -> dict[str, Any]:
    return orbax_io.flatten({"params": params, "opt_state": opt_state})


def write_run(out: Path, config: Config, state: RunArrays, event: dict[str, Any]) -> None:
    """Writes the new run `out`, whole or not at all; moments that `state` lacks start at zero.

    `event` is the first line of its metrics.jsonl. Raises UserError where `out` exists or its disk
    is full.
    """
    program = host_program(config, state.vocab_size)
    step = state.counters["step"]
    meta = state.meta | {"config": dump_config(config), "placement": program.placement.to_json()}
    with new_folder(out) as part:
        origin = {key: value for key, value in event.items() if key != "layers"}
        run_dir.write_description(
            part, config, environment.describe_environment(config, origin=origin)
        )
        writer = MetricsWriter(part)
        writer.write({"step": step, **event})
        writer.close()
        run_dir.keep_tokenizer(part, state.tokenizer)
        checkpoints = Checkpoints(
            part / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best
        )
        checkpoints.save(step, _train_state(program, state), meta, wait=True)


def _train_state(program: TrainProgram, state: RunArrays) -> Any:
    """The arrays as a TrainState on one device, tables those of the program's placement."""
    shape = program.abstract_state
    device = program.mesh.devices.flat[0]
    known = {name: jax.device_put(array, device) for name, array in state.arrays.items()}
    params = [known[f"params/{name}"] for name in orbax_io.flatten(shape.params)]
    fresh = initial_state.begin(
        program,
        jax.tree.unflatten(jax.tree.structure(shape.params), params),
        state.bias_LE,
        state.counters["seed"],
    )
    moments = [
        known.get(f"opt_state/{name}", leaf)
        for name, leaf in orbax_io.flatten(fresh.opt_state).items()
    ]
    opt_state = jax.tree.unflatten(jax.tree.structure(shape.opt_state), moments)
    counters = {
        name: jax.device_put(np.asarray(state.counters[name], getattr(fresh, name).dtype), device)
        for name in COUNTERS
    }
    return fresh._replace(opt_state=opt_state, **counters)


def measured_load(run: Path, step: int, layers: list[int], num_experts: int) -> Load:
    """The load up to a checkpoint: that of traffic.json where it was written with it, else of the
    newest lines of metrics.jsonl.

    In a run that was resized and has not trained since, copies have none and the others what they
    had before. Raises UserError where nothing was measured, or for another model.
    """
    if (run / RUN_FILE).is_file():
        measured = read_measured(run)
        if measured.step == step and measured.traffic_LRE.any():
            return _checked(
                measured.traffic_LRE.sum(axis=1) * measured.steps,
                run / RUN_FILE,
                measured.layers,
                layers,
                num_experts,
            )
    metrics = run / FILE_NAME
    trained: list[Any] = []
    before: list[Any] = []  # what the experts had before the run was resized
    for record in iter_metrics(metrics):
        if record["step"] > step or not record.get("layers"):
            continue
        if record.get("event") == "resized":
            trained, before = [], [record["layers"]]
        elif "event" not in record:
            trained.append(record["layers"])
    lines = trained[-LINES:] or before
    if not lines:
        raise UserError(
            f"{metrics} has no line with the experts' load up to step {step}: train the run first."
        )
    load = np.sum(
        [np.array([layer["load"] for layer in line], np.float64) for line in lines], axis=0
    )
    checked = _checked(load, metrics, [layer["layer"] for layer in lines[-1]], layers, num_experts)
    words = (
        f"the newest {len(trained[-LINES:])} training lines"
        if trained
        else "the line written when it was resized"
    )
    return checked._replace(origin=f"{words} of {metrics}")


def _checked(
    load_LE: np.ndarray, file: Path, its_layers: list[int], layers: list[int], num_experts: int
) -> Load:
    if its_layers != layers or load_LE.shape != (len(layers), num_experts):
        raise UserError(
            f"{file} has a load of shape {list(load_LE.shape)} for layers {its_layers} and the run "
            f"has {num_experts} experts in layers "
            f"{layers}: restore the file, or remove it and train on."
        )
    return Load(load_LE, str(file))
