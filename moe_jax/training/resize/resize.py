"""Changing the number of experts of a run that has trained: into a new run, which goes on at the
same step.

print(resize(Path("runs/first"), Path("runs/wider"), Wanted(experts=12)))

More experts: copies of the busiest, with noise. Fewer: without the least used. A dense model, a
run's or a Hugging Face folder's, becomes one whose experts are copies of its feed-forward part
(sparse upcycling, Komatsuzaki et al., 2022). docs/resizing.md says what each preserves. The whole
state must fit into the host's memory, about three times.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_jax import __version__
from moe_jax.config.load import dump_value, load_config
from moe_jax.config.model import MoEConfig
from moe_jax.config.schema import Config
from moe_jax.data.corpus import load_corpus
from moe_jax.data.run_corpus import read_corpus
from moe_jax.errors import UserError
from moe_jax.hf.chronos_config import is_chronos
from moe_jax.model_io.describe import Description
from moe_jax.model_io.source import HubSource, LocalSource, PackedSource, RunSource, find
from moe_jax.models.layer_pattern import count_moe_layers, expert_layers, layer_kinds
from moe_jax.models.parameters import parameters
from moe_jax.tracking.run_dir import read_run_config
from moe_jax.training import initial_state
from moe_jax.training.resize.experts import Copies, carry, choose, from_dense, new_router
from moe_jax.training.resize.forecaster import bolt_leaf, open_bolt
from moe_jax.training.resize.host_state import (
    COUNTERS,
    RunArrays,
    array_shapes,
    host_program,
    measured_load,
    read_run,
    write_run,
)
from moe_jax.utils.files import refuse_existing

# of copies of experts; those of a dense part have none by default, so that the outputs stay
NOISE = 0.01


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is asked for; None is the default, or what the run has."""

    experts: int
    top_k: int | None = None
    noise: float | None = None
    moments: Literal["zero", "copy"] = "zero"
    seed: int = 0
    config: Path | None = None  # how to train what a Hugging Face folder becomes
    first_dense: int | None = None  # a dense model: which layers get experts
    every: int | None = None


def resize(
    source: Path, out: Path, wanted: Wanted, *, step: int | None = None, fallback: bool = False
) -> str:
    """Writes the new run `out` with another number of experts; returns what was done, layer by
    layer, and what to run next.

    `source` is a run, whose checkpoint `step` (by default the newest) is read, or a dense Hugging
    Face folder or a model on the hub; it is left as it is. Raises UserError for what cannot be, and
    where `out` exists.
    """
    _check(source, out, wanted)
    origin = find(source)
    if isinstance(origin, PackedSource):
        raise UserError(
            f"{source} is a converted folder: name the folder or the run that it was made from."
        )
    if is_chronos(source):
        return _upcycle_forecaster(source, out, wanted)
    described = origin.describe()
    is_run = isinstance(origin, RunSource)
    if described.model.forecasts:
        raise UserError(
            f"{source} is a forecaster, whose experts stay as many as they are: only a folder of "
            f"Chronos-Bolt is given experts."
        )
    has_experts = count_moe_layers(described.model, described.moe) > 0
    if is_run and wanted.config is not None:
        raise UserError(
            f"{source} is a run and has its own config.yaml: leave --config {wanted.config} out."
        )
    if not is_run and wanted.config is None:
        raise UserError(
            f"{source} does not say how to train: add --config with a YAML configuration."
        )
    if has_experts and not is_run:
        raise UserError(
            f"{source} has experts already: train from it with init_from, then resize that run."
        )
    if has_experts:
        return _change(source, out, wanted, step, fallback)
    local = origin.download() if isinstance(origin, HubSource) else origin
    return _upcycle(local, out, wanted, described, source, step, fallback)


def _check(source: Path, out: Path, wanted: Wanted) -> None:
    if source.is_file():
        raise UserError(f"{source} is a file: name a run directory or a Hugging Face folder.")
    refuse_existing(out)
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"{out} lies in {source}, which is to stay as it is: name a directory outside it."
        )
    if wanted.noise is not None and not (math.isfinite(wanted.noise) and wanted.noise >= 0):
        raise UserError(
            f"--noise {wanted.noise} must be a finite number that is not negative, such as {NOISE}."
        )


def _with_experts(config: Config, wanted: Wanted, **changes: Any) -> Config:
    """The configuration with other experts, without the model that it once began from and a table
    of the experts it had.
    """
    changes |= {} if wanted.top_k is None else {"top_k": wanted.top_k}
    changes["dropless"] = bool(config.moe.dropless)  # a run's own says what it does
    _check_experts(wanted, changes.get("top_k", config.moe.top_k), config.moe.num_groups)
    placement = config.placement
    if placement.strategy == "custom":
        placement = dataclasses.replace(placement, strategy="contiguous", file=None)
    try:
        moe = dataclasses.replace(config.moe, num_experts=wanted.experts, **changes)
        return dataclasses.replace(config, moe=moe, placement=placement, init_from=None)
    except UserError as error:
        raise UserError(
            f"--experts {wanted.experts} does not go with the configuration: {error}"
        ) from error


def _check_experts(wanted: Wanted, top_k: int, groups: int) -> None:
    if wanted.experts < top_k:
        raise UserError(
            f"--experts {wanted.experts} is less than the {top_k} that a token takes: give more, "
            f"or a smaller --top-k."
        )
    if wanted.experts % groups:
        raise UserError(
            f"--experts {wanted.experts} do not divide among moe.num_groups={groups}: give a "
            f"multiple of {groups}."
        )


def _change(run: Path, out: Path, wanted: Wanted, step: int | None, fallback: bool) -> str:
    """Another number of experts for a run that has some."""
    config = read_run_config(run)
    before = config.moe.num_experts
    if wanted.experts == before:
        raise UserError(f"--experts {before} is the number that {run} has: give another.")
    if wanted.first_dense is not None or wanted.every is not None:
        raise UserError(
            f"--first-dense and --every choose the layers of a dense model, and {run} has "
            f"experts: leave them out."
        )
    if wanted.noise is not None and wanted.experts < before:
        raise UserError(
            f"--noise {wanted.noise} is for copies, and --experts {wanted.experts} makes none of "
            f"{before}: leave it out."
        )
    new = _with_experts(config, wanted)
    state = read_run(run, config, step=step, fallback=fallback)
    numbers = [i for i, kind in enumerate(layer_kinds(config.model, config.moe)) if kind.moe]
    load = measured_load(run, state.counters["step"], numbers, before)
    change = choose(load.count_LE, wanted.experts, config.moe.num_groups)
    copies = Copies(NOISE if wanted.noise is None else wanted.noise, wanted.moments, wanted.seed)
    wanted_shapes = array_shapes(host_program(new, state.vocab_size))
    arrays = carry(
        state.arrays, wanted_shapes, change, expert_layers(config.model, config.moe), copies
    )
    assert state.bias_LE is not None
    bias_LE = np.take_along_axis(state.bias_LE, change.source_LE, axis=1)
    # A copy was chosen by nobody yet: without training in between it is the first to be removed
    # again.
    after_LE = np.where(
        change.copied_LE, 0, np.take_along_axis(load.count_LE, change.source_LE, axis=1)
    )
    parts = zip(numbers, change.source_LE.tolist(), after_LE.tolist(), strict=True)
    event = {
        **_event("resized", run, new, copies),
        "num_experts_before": before,
        "layers": [
            {"layer": layer, "source": source, "load": counts} for layer, source, counts in parts
        ],
    }
    write_run(out, new, state._replace(arrays=arrays, bias_LE=bias_LE), event)
    lines = [
        f"{out}: {run} at step {state.counters['step']}, {before} experts -> {wanted.experts}; "
        f"load from {load.origin}."
    ]
    if new.placement != config.placement:
        lines.append(
            f"  placement.strategy: contiguous, as {config.placement.file} is a table of {before} "
            f"experts."
        )
    lines += [
        _layer_line(*row)
        for row in zip(numbers, load.count_LE, change.source_LE, change.copied_LE, strict=True)
    ]
    return "\n".join(
        [*lines, *_missing(wanted_shapes, arrays), *_next(out, new, state.counters["step"])]
    )


def _layer_line(layer: int, count_E: np.ndarray, source_E: np.ndarray, copied_E: np.ndarray) -> str:
    """What happened to a layer, with each expert's share of the load before."""
    share_E = count_E / max(count_E.sum(), 1)
    if copied_E.any():
        parts = [
            f"{expert} ({share_E[expert]:.1%}) as {at}"
            for at, expert in enumerate(source_E)
            if copied_E[at]
        ]
        return f"  layer {layer}: copied {', '.join(parts)}"
    removed = np.setdiff1d(np.arange(len(count_E)), source_E)
    return (
        f"  layer {layer}: removed "
        f"{', '.join(f'{expert} ({share_E[expert]:.1%})' for expert in removed)}"
    )


def _upcycle(
    source: LocalSource,
    out: Path,
    wanted: Wanted,
    described: Description,
    name: Path,
    step: int | None,
    fallback: bool,
) -> str:
    """Experts for a dense model, which was asked for by `name`."""
    if isinstance(source, RunSource):
        config = read_run_config(source.path)
        new = _upcycled(config, config.moe, wanted)
        state = read_run(source.path, config, step=step, fallback=fallback)
    else:
        given = load_config(wanted.config or source.path)
        config = _adopted(given, source.path, out, described)
        new = _upcycled(config, given.moe, wanted)
        state = _read_folder(source, config, described)
    copies = Copies(wanted.noise or 0.0, wanted.moments, wanted.seed)
    wanted_shapes = array_shapes(host_program(new, state.vocab_size))
    before = parameters(config.model, described.moe, state.vocab_size)
    after = parameters(new.model, new.moe, state.vocab_size)
    arrays = from_dense(state.arrays, before, wanted_shapes, after, wanted.experts, copies)
    write_run(
        out,
        new,
        state._replace(arrays=arrays, bias_LE=None),
        _event("upcycled", name, new, copies),
    )
    numbers = [i for i, kind in enumerate(layer_kinds(new.model, new.moe)) if kind.moe]
    lines = [
        f"{out}: {name} at step {state.counters['step']}, the feed-forward part (hidden "
        f"width {new.moe.hidden}) of each of layers "
        f"{', '.join(map(str, numbers))} copied into {wanted.experts} experts, of which a token "
        f"takes {new.moe.top_k}."
    ]
    return "\n".join(
        [*lines, *_missing(wanted_shapes, arrays), *_next(out, new, state.counters["step"])]
    )


def _upcycle_forecaster(folder: Path, out: Path, wanted: Wanted) -> str:
    """Experts for the decoder of a dense Chronos-Bolt folder."""
    if wanted.config is None:
        raise UserError(
            f"{folder} does not say how to train: add --config with a YAML configuration, such as "
            f"configs/forecast-moe.yaml."
        )
    if wanted.noise:
        raise UserError(
            f"--noise {wanted.noise} would change what {folder} forecasts: leave it out; experts "
            f"become different as they are trained on different series."
        )
    given = load_config(wanted.config)
    checkpoint, model = open_bolt(folder)
    config = dataclasses.replace(
        given,
        model=initial_state.adopt(given.model, model, "model.", str(folder)),
        moe=dataclasses.replace(given.moe, dropless=given.moe.dropless is not False),
    )
    new = _upcycled(config, config.moe, wanted)
    corpus = read_corpus(new.model, new.data, new.train, new.data.tokenizer)
    vocab_size = initial_state.vocabulary(new, corpus)
    arrays = {}
    for path, parameter in parameters(new.model, new.moe, vocab_size).items():
        arrays[f"params/{path}"] = (
            new_router(parameter.path, (0,), (1, *parameter.shape), wanted.seed)[0]
            if parameter.path.is_router
            else bolt_leaf(checkpoint, model, parameter, wanted.experts)
        )
    position = corpus.train_batches(new.train.global_batch).get_state()
    meta = {"version": __version__, "data": position, "corpus_hash": corpus.hash}
    counters = dict.fromkeys(COUNTERS, 0) | {"seed": new.train.seed}
    copies = Copies(0.0, wanted.moments, wanted.seed)
    state = RunArrays(arrays, None, counters, meta, vocab_size, new.data.tokenizer)
    write_run(out, new, state, _event("upcycled", folder, new, copies))
    lines = [
        f"{out}: {folder}, the feed-forward part (hidden width {new.moe.hidden}) of each layer of "
        f"its decoder copied into {wanted.experts} experts, of which a series takes "
        f"{new.moe.top_k}."
    ]
    return "\n".join([*lines, *_next(out, new, 0)])


def _upcycled(config: Config, moe: MoEConfig, wanted: Wanted) -> Config:
    """The configuration of a dense model with the experts that `moe` describes, as far as it keeps
    the outputs.

    K equal experts give what the dense part gave if their weights sum to 1 and nothing is added.
    """
    dense = (
        count_moe_layers(config.model, moe) == 0
    )  # a run's own section, which keeps experts out of all layers
    layers: dict[str, Any] = {"first_dense": 0, "every": 1, "dense_layers": ()} if dense else {}
    layers |= {
        key: value
        for key in ("first_dense", "every")
        if (value := getattr(wanted, key)) is not None
    }
    needed = {
        "normalize": "after",
        "routed_scale": 1.0,
        "shared_experts": 0,
        "swiglu_limit": None,
        "expert_bias": config.model.mlp_bias,
    }
    for key, value in needed.items():
        if getattr(moe, key) not in (value, getattr(MoEConfig(), key)):
            raise UserError(
                f"moe.{key}={dump_value(getattr(moe, key))} would change what the dense model "
                f"computes: leave it out."
            )
    new = _with_experts(
        dataclasses.replace(config, moe=moe), wanted, hidden=config.model.hidden, **layers, **needed
    )
    if not count_moe_layers(new.model, new.moe):
        raise UserError(
            f"--first-dense {new.moe.first_dense} with --every {new.moe.every} leaves none of the "
            f"{new.model.num_layers} layers with experts: lower one of them."
        )
    return new


def _adopted(config: Config, folder: Path, out: Path, described: Description) -> Config:
    """A configuration with the dense model and the tokenizer of a Hugging Face folder."""
    if config.init_from is not None:
        raise UserError(
            f"init_from={config.init_from} does not go with a folder to begin from ({folder}): "
            f"leave it out."
        )
    config = dataclasses.replace(config, moe=described.moe, init_from=str(folder))
    return initial_state.resolve(config, out, initial_state.Origin(config, out), resume=False)


def _read_folder(folder: LocalSource, config: Config, described: Description) -> RunArrays:
    """A dense Hugging Face folder as a run that has not begun."""
    corpus = load_corpus(config.data, config.train.seq_len, config.train.seed)
    vocab_size = initial_state.vocabulary(config, corpus)
    weights = folder.weights()
    arrays = {
        f"params/{path}": np.ascontiguousarray(weights.leaf(path, None), np.float32)
        for path in parameters(described.model, described.moe, described.vocab_size)
    }
    counters = dict.fromkeys(COUNTERS, 0) | {"seed": config.train.seed}
    position = corpus.train_batches(config.train.global_batch).get_state()
    meta = {"version": __version__, "data": position, "corpus_hash": corpus.hash}
    return RunArrays(arrays, None, counters, meta, vocab_size, config.data.tokenizer)


def _event(name: str, source: Path, new: Config, copies: Copies) -> dict[str, Any]:
    """The line of metrics.jsonl that a resized run begins with."""
    asked = {"noise": copies.noise, "moments": copies.moments, "seed": copies.seed}
    return {
        "event": name,
        "source": str(source),
        "num_experts": new.moe.num_experts,
        "top_k": new.moe.top_k,
        **asked,
    }


def _missing(wanted: dict[str, tuple[int, ...]], arrays: dict[str, np.ndarray]) -> list[str]:
    """A line about the moments that were not carried over; one number is Adafactor's placeholder
    for none.
    """
    missing = [
        name for name, shape in wanted.items() if name not in arrays and math.prod(shape) > 1
    ]
    return (
        [f"  {len(missing)} arrays of optimizer moments have no counterpart and begin at zero."]
        if missing
        else []
    )


def _next(out: Path, config: Config, step: int) -> list[str]:
    """What to run now."""
    command = (
        f"moe-jax train {shlex.quote(str(out / 'config.yaml'))} --run-dir "
        f"{shlex.quote(str(out))} --resume"
    )
    more = f" --set train.steps={2 * step}" if step >= config.train.steps else ""
    return (
        [f"  All of train.steps={config.train.steps} were done: give more."] if more else []
    ) + [f"Next: {command}{more}"]
