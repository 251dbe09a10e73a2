"""Opening a model to run: a Hugging Face folder, a run directory, a converted folder, or a name on
the hub.

    loaded = open_model("path/to/folder", mesh=MeshConfig(expert=4), dtype="bfloat16")
    logits_BV = loaded.session().feed([[1, 5, 9]])

A folder is first found and planned (`StoredModel`), then checked (`Preconditions`), and only then
are its weights read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from moe_jax import hf
from moe_jax.checkpoint import expert_layout
from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.config.schema import MeshConfig
from moe_jax.data.tokenizer import Tokenizer, load_tokenizer
from moe_jax.errors import UserError
from moe_jax.inference import packed_checkpoint, restore
from moe_jax.inference.engine import Engine, ResidentEngine
from moe_jax.inference.memory import check_weight_memory
from moe_jax.inference.offload import check_size, offload
from moe_jax.inference.read_weights import read_params, serving_tables
from moe_jax.inference.session import LoadedModel, Session
from moe_jax.model_io import packed_header
from moe_jax.model_io.describe import read_kept_config
from moe_jax.model_io.hub import name_of
from moe_jax.model_io.source import INT4_GROUP, PackedSource, RunSource, YamlSource, find_local
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.parallel.mesh import first_devices, make_mesh
from moe_jax.placement.table import Placement, contiguous
from moe_jax.runtime.platform import default_platform
from moe_jax.tracking.run_dir import read_run_config, run_tokenizer
from moe_jax.utils.progress import say

__all__ = ["LoadedModel", "Session", "open_model"]


def open_model(
    path: Path | str,
    *,
    mesh: MeshConfig | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    group: int = INT4_GROUP,
    memory: int | None = None,
    step: int | None = None,
    fallback: bool = False,
    context: int | None = None,
    expert_cache: int | None = None,
    redundant_slots: int = 0,
    check: Callable[[Tokenizer, int], None] | None = None,
    check_plan: Callable[[ServingPlan, int], None] | None = None,
) -> LoadedModel:
    """A model on a mesh. Raises UserError, one sentence, for whatever is wrong with the folder, the
    mesh or the memory.

    Args:
      path: a folder, or `org/name` on the Hugging Face hub, which is downloaded.
      mesh: the devices, by default one; those beyond it stay unused.
      dtype: of weights, activations and cache; by default float32 on CPU and bfloat16 elsewhere.
      quantize: hold experts and projections in 8 or 4 bits; `group` inputs share a scale with int4.
      memory: bytes that a device may use for weights; by default what the platform reports.
      step, fallback: which checkpoint of a run, as in `Checkpoints.restore_latest`.
      context: tokens that a sequence may have, if not as many as the model was made for.
      expert_cache: experts per layer that the device keeps, the others in host memory (offload.py);
        by default it holds all.
      redundant_slots: slots per device and layer beyond its share of the experts, for replicas.
      check, check_plan: called with the tokenizer, or the plan, and the context before weights
        are read; they may refuse.
    """
    stored = find_model(
        Path(path),
        mesh or MeshConfig(),
        dtype=dtype,
        quantize=quantize,
        group=group,
        step=step,
        fallback=fallback,
        redundant_slots=redundant_slots,
    )
    Preconditions(memory, context, check, expert_cache, check_plan).require(stored)
    if context is not None and context > stored.context:
        say(
            f"{stored.name} was made for {stored.context:,} tokens: in a context of {context:,}, "
            f"what it gives beyond them may be worse."
        )
    if (idle := stored.plan.idle_note()) is not None:
        say(idle)
    params, bias_LE = stored.read(expert_cache is not None)
    tables = serving_tables(stored.plan, bias_LE)
    engine: Engine = (
        ResidentEngine(stored.plan, params, tables)
        if expert_cache is None
        else offload(stored.plan, params, tables, expert_cache)
    )
    return LoadedModel(
        engine, stored.tokenizer, context or stored.context, stored.eos_ids, stored.name
    )


class StoredModel(NamedTuple):
    """A model in a folder: what it is, how its weights will lie on a mesh, and how to read them."""

    plan: ServingPlan
    tokenizer: Tokenizer
    context: int  # tokens that it was made for
    eos_ids: tuple[int, ...]
    name: str
    read: Callable[[bool], tuple[Any, Any]]
    """(weights, selection bias [L, E] or None); with True on one device, experts stay on the
    host.
    """
    reads_masters: bool = False  # weights pass through the devices in f32
    converted: bool = False  # weights have the types that they were converted to


class Preconditions(NamedTuple):
    """What must hold before weights are read."""

    memory: int | None = None
    context: int | None = None
    check: Callable[[Tokenizer, int], None] | None = None
    expert_cache: int | None = None
    check_plan: Callable[[ServingPlan, int], None] | None = None

    def require(self, stored: StoredModel) -> None:
        """Raises UserError where the weights do not fit, the experts' cache is impossible, or a
        check refuses.
        """
        if self.expert_cache is not None:
            check_size(stored.plan, self.expert_cache)
        check_weight_memory(
            stored.plan,
            self.memory,
            packs=stored.reads_masters,
            converted=stored.converted,
            expert_cache=self.expert_cache,
        )
        context = self.context or stored.context
        if self.check_plan is not None:
            self.check_plan(stored.plan, context)
        if self.check is not None:
            self.check(stored.tokenizer, context)


def find_model(
    path: Path,
    mesh: MeshConfig,
    *,
    dtype: str | None,
    quantize: str | None,
    group: int,
    step: int | None,
    fallback: bool,
    to_write: bool = False,
    redundant_slots: int = 0,
) -> StoredModel:
    """The model of a folder, or of a name on the hub, planned for a mesh; arguments as those of
    `open_model`. With `to_write` every parameter is one array, as it is saved.
    """
    if mesh.size > jax.device_count():
        raise UserError(
            f"--mesh {mesh.axes_text} needs {mesh.size} devices and there are "
            f"{jax.device_count()}: choose a smaller one, or try it on simulated CPU devices with "
            f"--simulate {mesh.size}."
        )
    devices = make_mesh(mesh, first_devices(mesh.size))
    source = find_local(path)
    if isinstance(source, PackedSource):
        return _find_converted(source.path, devices, dtype, quantize, redundant_slots)
    held: dict[str, Any] = {
        "dtype": dtype or default_platform().dtype,
        "quantization": quantize or "float",
        "group": group,
    }
    if isinstance(source, RunSource):
        return _find_run(source.path, devices, held, step, fallback, redundant_slots)
    if isinstance(source, YamlSource):
        source.weights()  # refuses: it has none
    held["cuts_banks"] = default_platform().shares_memory and not to_write
    return _find_hf(source.path, devices, held, redundant_slots)


def _contiguous(model: ModelConfig, moe: MoEConfig, mesh: Mesh, redundant_slots: int) -> Placement:
    layers, ranks = count_moe_layers(model, moe), mesh.shape["expert"]
    return contiguous(layers, moe.num_experts, ranks, redundant_slots)


def _find_hf(folder: Path, mesh: Mesh, held: dict[str, Any], redundant_slots: int) -> StoredModel:
    checkpoint = hf.open_checkpoint(folder)
    tokenizer = load_tokenizer(str(folder), field="tokenizer")
    model, moe = checkpoint.model, checkpoint.moe
    placement = _contiguous(model, moe, mesh, redundant_slots)
    plan = ServingPlan(model, moe, mesh, placement, vocab_size=checkpoint.vocab_size, **held)

    def read(experts_on_host: bool) -> tuple[Any, Any]:
        params = read_params(plan, checkpoint.leaf, experts_on_host=experts_on_host)
        return params, checkpoint.bias_LE()

    name, eos_ids = name_of(folder), _end_ids(checkpoint.eos_ids, tokenizer)
    return StoredModel(plan, tokenizer, checkpoint.context, eos_ids, name, read)


def _end_ids(stated: Iterable[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a text: those that a folder's configs state and those of its tokenizer, for
    many folders state only some.
    """
    return tuple(dict.fromkeys((*stated, *tokenizer.end_ids)))


def _find_run(
    path: Path,
    mesh: Mesh,
    held: dict[str, Any],
    step: int | None,
    fallback: bool,
    redundant_slots: int,
) -> StoredModel:
    """A run's checkpoint on any mesh, whatever mesh it was trained on. Choices are dropless, else a
    token could depend on padding.
    """
    config = read_run_config(path)
    tokenizer = load_tokenizer(run_tokenizer(path, config))
    checkpoints = Checkpoints(
        path / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best
    )
    saved = expert_layout.saved_placement(checkpoints, step, fallback)
    moe = dataclasses.replace(config.moe, dropless=True)
    placement = restore.serving_placement(saved, mesh.shape["expert"], redundant_slots)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    plan = ServingPlan(config.model, moe, mesh, placement, vocab_size=vocab_size, **held)

    def read(experts_on_host: bool) -> tuple[Any, Any]:
        params, bias_LE = restore.restore_model(checkpoints, plan, step=step, fallback=fallback)
        return plan.pack(params, consume=True), bias_LE

    kept = read_kept_config(path)
    stated = hf.eos_ids(path / "tokenizer", kept) if kept else ()
    eos_ids, context = _end_ids(stated, tokenizer), config.train.seq_len
    return StoredModel(plan, tokenizer, context, eos_ids, path.name, read, reads_masters=True)


def _find_converted(
    path: Path, mesh: Mesh, dtype: str | None, quantize: str | None, redundant_slots: int
) -> StoredModel:
    header = packed_header.read_packed_header(path)
    for option, asked, has in (
        ("--dtype", dtype, header.dtype),
        ("--quantize", quantize, header.quantization),
    ):
        if asked not in (None, has):
            raise UserError(
                f"{option} {asked} but {path} was converted to {has}: leave the option out, or "
                f"convert the model again."
            )
    model, moe = header.model, header.moe
    placement = _contiguous(model, moe, mesh, redundant_slots)
    held: dict[str, Any] = {
        "dtype": header.dtype,
        "quantization": header.quantization,
        "group": header.group,
    }
    plan = ServingPlan(model, moe, mesh, placement, vocab_size=header.vocab_size, **held)
    tokenizer = load_tokenizer(packed_header.packed_tokenizer(path, header), field="tokenizer")

    def read(experts_on_host: bool) -> tuple[Any, Any]:
        return packed_checkpoint.restore_packed(path, plan, experts_on_host=experts_on_host)

    eos_ids = _end_ids(header.eos_ids, tokenizer)
    return StoredModel(plan, tokenizer, header.context, eos_ids, header.name, read, converted=True)
