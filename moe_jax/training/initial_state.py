"""What a run starts from: weights drawn at random, or, with `init_from`, those of another model
with its architecture and tokenizer.

    origin = Origin(config, run_dir)
    config = resolve(config, run_dir, origin, resume=False)   # with the architecture of init_from
    state = first_state(program, config, origin)
    keep_hf_config(run_dir, config, origin)
"""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.load import dump_value
from moe_jax.config.schema import Config, DataConfig
from moe_jax.data.corpus import Corpus
from moe_jax.data.series.training import SeriesData
from moe_jax.errors import UserError
from moe_jax.model_io.describe import Description
from moe_jax.model_io.packed_header import KEPT_CONFIG
from moe_jax.model_io.source import HubSource, HuggingFaceSource, RunSource, find
from moe_jax.model_io.weights import Weights
from moe_jax.models.layer_pattern import expert_layers
from moe_jax.models.parameters import FORECASTER_TOKENS
from moe_jax.models.paths import ParameterPath, path_of
from moe_jax.moe.tables import make_tables
from moe_jax.tracking.run_dir import read_run_config
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram
from moe_jax.utils.files import is_hub_name, local_path, replace_text
from moe_jax.utils.progress import byte_progress

# Keys of the `model` and `moe` sections that say how to compute or to train: they are the
# configuration's own.
OWN = frozenset(
    [
        "model.compute_dtype",
        "model.remat",
        "model.attention",
        "moe.capacity_factor",
        "moe.expert_dropout",
        "moe.bias_rate",
        "moe.variance_loss",
        "moe.dispatch",
        "moe.gather_below",
        "moe.overlap_chunks",
        "moe.grouped_matmul",
    ]
)

# Keys that the other model says how it was trained or computes with, where the configuration leaves
# them at their defaults.
TAKEN_OVER = frozenset(
    [
        "moe.dropless",
        "moe.input_noise",
        "moe.z_loss",
        "moe.aux_loss",
        "moe.aux_over",
        "moe.sequence_aux_loss",
    ]
)


class Origin:
    """The model that `init_from` names; it is described, and if need be downloaded, once, when
    somebody asks. Raises UserError where it cannot be a beginning.
    """

    def __init__(self, config: Config, directory: Path):
        """`directory` is the run's own."""
        self.name, self.directory = str(config.init_from), directory

    @cached_property
    def description(self) -> Description:
        """What config.json and the headers say about the model, or a run's config.yaml."""
        return self._source.describe()

    @cached_property
    def local(self) -> HuggingFaceSource | RunSource:
        """The folder, with a model of the hub downloaded."""
        source = self._source
        return source.download() if isinstance(source, HubSource) else source

    @property
    def tokenizer(self) -> str:
        """What `load_tokenizer` takes."""
        return (
            str(self.local.path)
            if isinstance(self._source, HubSource)
            else self.description.tokenizer
        )

    @cached_property
    def _source(self) -> HuggingFaceSource | RunSource | HubSource:
        path = local_path(self.name)
        if is_hub_name(path):
            return HubSource(self.name, "init_from=")
        if not path.is_dir():
            raise UserError(
                f"init_from={self.name!r} is not a folder: name a Hugging Face folder, a run "
                f"directory, or a model on the hub such as Qwen/Qwen3-30B-A3B."
            )
        if path.resolve() == self.directory.resolve():
            raise UserError(
                f"init_from={self.name!r} is the run's own directory: continue that run with "
                f"--resume, or name another."
            )
        source = find(path)
        if not isinstance(source, HuggingFaceSource | RunSource):
            raise UserError(
                f"init_from={self.name!r} is a converted folder: name the folder or the run "
                f"that it was made from."
            )
        return source


def resolve(config: Config, directory: Path, origin: Origin, *, resume: bool) -> Config:
    """The configuration with the architecture and, unless it names another, the tokenizer of
    `init_from`.

    Everything in `OWN` stays as it is; a null `moe.dropless` is decided. A resumed run takes them
    from its own config.yaml, so that the other model need not be there any more. Raises UserError
    for a key that was set (differs from its default) and contradicts the architecture, and for what
    is wrong with the folder.
    """
    if config.init_from is None:
        return _with_dropless(config)
    resumed = resume and (directory / "config.yaml").is_file()
    before = read_run_config(directory) if resumed else None
    if before is not None:
        if before.init_from != config.init_from:
            return _with_dropless(config)  # which `claim` refuses, naming both
        model, moe = before.model, before.moe
    else:
        theirs = origin.description
        model, moe = dataclasses.replace(theirs.model, vocab_size=theirs.vocab_size), theirs.moe
    origin_text = f"init_from={config.init_from}"
    adopted = dataclasses.replace(
        config,
        model=adopt(config.model, model, "model.", origin_text),
        moe=adopt(config.moe, moe, "moe.", origin_text),
    )
    tokenizer = config.data.tokenizer
    if tokenizer == DataConfig().tokenizer:
        tokenizer = origin.tokenizer if before is None else before.data.tokenizer
    data = dataclasses.replace(config.data, tokenizer=tokenizer)
    return _with_dropless(dataclasses.replace(adopted, data=data))


def _with_dropless(config: Config) -> Config:
    """The configuration with a null `moe.dropless` decided, so that a run's own says what it
    does. A forecaster drops none: a series would lose an expert.
    """
    chosen = config.moe.dropless
    dropless = config.model.forecasts if chosen is None else chosen
    moe = dataclasses.replace(config.moe, dropless=dropless)
    return dataclasses.replace(config, moe=moe)


def adopt(ours: Any, theirs: Any, prefix: str, origin: str) -> Any:
    """A section of ours with the architecture of theirs. Raises UserError for a key that was set
    and differs, naming their `origin`.
    """
    values = {}
    for field in dataclasses.fields(ours):
        key, mine, other = (
            f"{prefix}{field.name}",
            getattr(ours, field.name),
            getattr(theirs, field.name),
        )
        if key in OWN or (key in TAKEN_OVER and mine != field.default):
            continue
        if dataclasses.is_dataclass(mine):
            values[field.name] = adopt(mine, other, f"{key}.", origin)
        elif mine in (field.default, other):
            values[field.name] = other
        else:
            raise UserError(
                f"{key}={dump_value(mine)} but {origin} has {dump_value(other)} there: "
                f"leave {key} out."
            )
    return dataclasses.replace(ours, **values)


def first_state(program: TrainProgram, config: Config, origin: Origin) -> TrainState:
    """The state before the first step, sharded over the program's mesh; each process reads what its
    devices hold.

    A run as the source is restored whole in each process; a Hugging Face folder is read by byte
    ranges.
    """
    if config.init_from is None:
        return jax.block_until_ready(program.init(config.train.seed))
    weights = origin.local.weights()
    shapes, shardings = program.abstract_state.params, program.state_shardings.params
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    with byte_progress("loading", size) as done:

        def place(keys: tuple[Any, ...], shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
            array = _place(path_of(keys), shape, sharding, program, weights)
            done(array.nbytes)
            return array

        params = jax.tree.map_with_path(place, shapes, shardings)
    return begin(program, params, weights.bias_LE, config.train.seed)


def _place(
    path: ParameterPath,
    shape: jax.ShapeDtypeStruct,
    sharding: Any,
    program: TrainProgram,
    weights: Weights,
) -> jax.Array:
    """One parameter on the mesh, experts in the program's slots, f32."""
    rows_of = expert_layers(program.model, program.moe)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        if not path.is_expert:
            return np.ascontiguousarray(weights.leaf(path.text, index), np.float32)
        rows = rows_of[path.layer_block]
        repeats = []
        for repeat in range(shape.shape[0])[index[0]]:
            experts = program.placement.physical_to_logical[rows[repeat]][index[1]]
            one = (slice(repeat, repeat + 1), experts, *index[2:])
            repeats.append(weights.leaf(path.text, one))
        return np.concatenate(repeats).astype(np.float32)

    return jax.make_array_from_callback(shape.shape, sharding, part)


def begin(program: TrainProgram, params: Any, bias_LE: np.ndarray | None, seed: int) -> TrainState:
    """A state with these parameters and nothing done yet."""
    shardings = program.state_shardings
    moments = jax.jit(program.optimizer.init, out_shardings=shardings.opt_state)(params)

    def rest() -> TrainState:
        tables, expert_LP = make_tables(program.placement, program.hosts)
        if bias_LE is not None:
            tables = tables._replace(bias_E=jnp.asarray(bias_LE, jnp.float32))
        zero = jnp.int32(0)
        return TrainState(zero, jnp.uint32(seed), None, None, tables, expert_LP, zero, zero)

    # Compiled, so that no two of its arrays share memory: a step takes over the memory of each, and
    # would take it twice.
    state = jax.jit(rest, out_shardings=shardings._replace(params=None, opt_state=None))()
    return jax.block_until_ready(state._replace(params=params, opt_state=moments))


def keep_hf_config(directory: Path, config: Config, origin: Origin) -> None:
    """Puts the config.json that an export will have into the run's directory."""
    hf_config = None if config.init_from is None else origin.description.hf_config
    if hf_config is not None:
        replace_text(directory / KEPT_CONFIG, json.dumps(hf_config, indent=2) + "\n")


def vocabulary(config: Config, corpus: Corpus | SeriesData) -> int:
    """The model's vocabulary: as configured, or the tokenizer's, which may have ids that no text
    uses and the model has no row for. Raises UserError where the text or the mesh does not fit.
    """
    if isinstance(corpus, SeriesData):
        return FORECASTER_TOKENS
    size = config.model.vocab_size or corpus.tokenizer.vocab_size
    largest = corpus.largest_id
    if size <= largest:
        what = "which ends a document" if largest == corpus.tokenizer.eos_id else "in data.source"
        remedy = (
            "raise it, or leave it out"
            if config.init_from is None
            else "name a token that ends a text as eos_token in its tokenizer_config.json"
            if largest == corpus.tokenizer.eos_id
            else f"name the tokenizer of {config.init_from} in data.tokenizer, or take that token "
            f"out of the text"
        )
        raise UserError(
            f"model.vocab_size={size} has no row for token {largest}, {what}, of "
            f"data.tokenizer={config.data.tokenizer!r}: {remedy}."
        )
    if size % config.mesh.tensor:
        raise UserError(
            f"mesh.tensor={config.mesh.tensor} does not divide the vocabulary of {size}: set "
            f"model.vocab_size to a multiple."
        )
    return size
