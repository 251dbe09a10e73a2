"""Opening a model to run: a Hugging Face folder, a run directory, a converted folder, or a name on
the hub.

Each process reads the parts that its devices hold and nothing else, a tensor at a time, into memory
that JAX then uses as it is: the peak is the model's share plus one tensor.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import hf
from moe_jax.checkpoint import expert_layout
from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.config.schema import MeshConfig
from moe_jax.data.tokenizer import Tokenizer, load_tokenizer
from moe_jax.errors import UserError
from moe_jax.inference import packed_checkpoint, restore
from moe_jax.inference.engine import Engine
from moe_jax.inference.memory import check_weight_memory
from moe_jax.inference.offload import check_size, offload
from moe_jax.inference.session import LoadedModel, Session
from moe_jax.model_io import packed_header
from moe_jax.model_io.describe import read_kept_config
from moe_jax.model_io.source import PackedSource, RunSource, find
from moe_jax.models.layer_pattern import count_moe_layers, expert_layers
from moe_jax.models.weight_layout import WeightPlan, bytes_of
from moe_jax.moe.tables import make_tables
from moe_jax.ops import quantized
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.sharding import named
from moe_jax.placement.table import EMPTY, contiguous
from moe_jax.runtime.platform import default_platform
from moe_jax.tracking.run_dir import read_run_config, run_tokenizer
from moe_jax.utils.progress import byte_progress

__all__ = ["LoadedModel", "Session", "open_model"]

ReadPart = Callable[[str, tuple[Any, ...]], np.ndarray]
HUB_FILES = ("*.json", "model*.safetensors", "*.jinja", "*.txt", "tokenizer.model")
HUB_COPIES = ("*/*",)  # folders with the same weights in other forms
ALIGNMENT = 64  # bytes: memory that begins at a multiple of it becomes a CPU array without a copy
QUANTIZED_AT_ONCE = 1 << 16  # weights: quantising takes a few times their memory
_quantize = jax.jit(quantized.quantize, static_argnums=(1, 2))  # of many pieces of few shapes


def open_model(
    path: Path | str,
    *,
    mesh: MeshConfig | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    group: int = 64,
    memory: int | None = None,
    step: int | None = None,
    fallback: bool = False,
    context: int | None = None,
    expert_cache: int | None = None,
    check: Callable[[Tokenizer, int], None] | None = None,
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
      expert_cache: experts a layer that the device keeps, the others in host memory (offload.py);
        by default it holds all.
      check: called with the tokenizer and the context before weights are read; it may refuse.
    """
    path, mesh = Path(path), mesh or MeshConfig()
    devices = make_mesh(mesh, jax.devices()[: mesh.size])
    options = {"quantization": quantize or "float", "group": group}
    before = Before(memory, context, check, expert_cache)
    source = find(find_folder(path))
    if isinstance(source, PackedSource):
        loaded = _open_converted(path, devices, dtype, quantize, before)
    elif isinstance(source, RunSource):
        loaded = _open_run(path, devices, _dtype(dtype), options, before, step, fallback)
    else:
        loaded = _open_hf(source.path, devices, _dtype(dtype), options, before)
    if expert_cache is not None:
        assert isinstance(loaded.engine, Engine)
        engine, params = offload(loaded.engine, loaded.params, expert_cache)
        loaded = dataclasses.replace(loaded, engine=engine, params=params)
    return loaded if context is None else dataclasses.replace(loaded, context=context)


class Before(NamedTuple):
    """What is looked at before weights are read."""

    memory: int | None
    context: int | None
    check: Callable[[Tokenizer, int], None] | None
    expert_cache: int | None = None

    def look(
        self, engine: Engine, tokenizer: Tokenizer, context: int, *, packs: bool = False
    ) -> None:
        """Raises UserError where the weights do not fit, the experts' cache cannot be, or `check`
        refuses.
        """
        if self.expert_cache is not None:
            check_size(engine, self.expert_cache)
        check_weight_memory(engine, self.memory, packs=packs, expert_cache=self.expert_cache)
        if self.check is not None:
            self.check(tokenizer, self.context or context)


def _dtype(asked: str | None) -> str:
    return asked or default_platform().dtype


def find_folder(path: Path) -> Path:
    """The path where it exists, else the folder with the hub's model of that name, downloaded."""
    if path.exists():
        return path
    name = str(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_COPIES)
            )
        )
    # no network, no such model, no leave: errors of many libraries, with no common base
    except Exception as error:
        cause = " ".join(str(error).split())[:160]
        raise UserError(
            f"--model {name} is no folder here and cannot be fetched from the hub ({cause}): "
            f"check the name."
        ) from error


# Hugging Face folders


def _open_hf(
    folder: Path, mesh: Mesh, dtype: str, options: dict[str, Any], before: Before
) -> LoadedModel:
    checkpoint = hf.open_checkpoint(folder)
    tokenizer = load_tokenizer(str(folder), field="--model")
    moe = checkpoint.moe
    placement = contiguous(
        count_moe_layers(checkpoint.model, moe), moe.num_experts, mesh.shape["expert"]
    )
    engine = Engine(
        checkpoint.model,
        moe,
        mesh,
        placement,
        vocab_size=checkpoint.vocab_size,
        dtype=dtype,
        **options,
    )
    before.look(engine, tokenizer, checkpoint.context)
    params = read_params(engine, checkpoint.leaf, experts_on_host=before.expert_cache is not None)
    return LoadedModel(
        engine,
        params,
        tables_of(engine, checkpoint.bias_LE()),
        tokenizer,
        checkpoint.context,
        checkpoint.eos_ids,
        folder.name,
    )


def tables_of(engine: Engine, bias_LE: Any) -> Any:
    """The engine's routing tables with a model's selection bias, on every device."""
    tables = make_tables(engine.placement)[0]
    if bias_LE is not None:
        tables = tables._replace(bias_E=jnp.asarray(bias_LE, jnp.float32))
    return jax.device_put(tables, NamedSharding(engine.mesh, P()))


def read_params(engine: Engine, read: ReadPart, *, experts_on_host: bool = False) -> Any:
    """The engine's weights from `read(path, index)`, which gives parts of training parameters in
    logical expert order.

    `index` has a slice for each dim, or an array of expert ids (-1 for none, which reads as zeros).
    On one device experts can be left where they were read to, as numpy arrays, for `offload`.
    """
    sizes = {path: bytes_of(leaf) for path, leaf in engine.plans.items()}
    found: dict[str, Any] = {}
    with byte_progress("loading", sum(sizes.values())) as done:
        for path, leaf in engine.plans.items():
            if experts_on_host and "/experts/" in path:
                order = leaf.order or tuple(range(len(leaf.shape)))
                found[path] = _read_part(
                    engine, leaf, order, tuple(slice(None) for _ in order), read
                )
            else:
                found[path] = _read_leaf(engine, leaf, read)
            done(sizes[path])
    return engine.tree(found)


def _read_leaf(engine: Engine, leaf: WeightPlan, read: ReadPart) -> Any:
    """One parameter, each distinct part read once and put on the devices that hold it."""
    order = leaf.order or tuple(range(len(leaf.shape)))
    held = NamedSharding(
        engine.mesh, P(*(leaf.spec[dim] if dim < len(leaf.spec) else None for dim in order))
    )
    parts: dict[Any, Any] = {}
    placed: list[list[jax.Array]] = []
    for device, index in held.addressable_devices_indices_map(leaf.ordered).items():
        assert index is not None
        key = tuple((part.start, part.stop) for part in index)
        if key not in parts:
            parts[key] = _read_part(engine, leaf, order, index, read)
        placed.append([jax.device_put(array, device) for array in jax.tree.leaves(parts[key])])
    shapes, structure = jax.tree.flatten(leaf.abstract())
    shardings = jax.tree.leaves(named(engine.mesh, leaf.held_spec()))
    arrays = [
        jax.make_array_from_single_device_arrays(shape.shape, sharding, list(shards))
        for shape, sharding, shards in zip(
            shapes, shardings, zip(*placed, strict=True), strict=True
        )
    ]
    return jax.tree.unflatten(structure, arrays)


def _read_part(
    engine: Engine,
    leaf: WeightPlan,
    order: tuple[int, ...],
    index: tuple[slice, ...],
    read: ReadPart,
) -> Any:
    """What one device holds of a parameter, in numpy; `index` cuts its dims in the order held."""
    bounds = [range(*part.indices(size)) for part, size in zip(index, leaf.ordered, strict=True)]
    small = leaf._replace(shape=tuple(len(bounds[order.index(dim)]) for dim in range(len(order))))
    out = jax.tree.map(lambda a: _aligned(a.shape, a.dtype), small.abstract())
    stacked, bank = leaf.path.startswith("stacks/"), "/experts/" in leaf.path
    apart = (
        stacked + bank + leaf.path.endswith("gate_up")
    )  # leading dims along which a checkpoint has a tensor for each entry
    for place in itertools.product(*(range(len(bounds[dim])) for dim in range(apart))):
        at = [bounds[dim][number] for dim, number in enumerate(place)]
        cut: list[Any] = [slice(bound.start, bound.stop) for bound in bounds]
        cut[: len(at)] = [slice(number, number + 1) for number in at]
        if bank:
            cut[1] = np.array([_expert_in(engine, leaf.path, *at[:2])])
        piece = _pack_piece(leaf, order, cut, read)
        jax.tree.map(
            lambda to, value, place=place: to.__setitem__(place, value.reshape(to[place].shape)),
            out,
            piece,
        )
    return out


def _pack_piece(leaf: WeightPlan, order: tuple[int, ...], cut: list[Any], read: ReadPart) -> Any:
    """A piece of a parameter as it is held, in numpy."""
    whole = list(cut)
    if leaf.kind == "int8":  # an output's scale is of all its inputs, those on other devices too
        whole[-leaf.inputs :] = [slice(0, size) for size in leaf.ordered[-leaf.inputs :]]
    values = read(leaf.path, tuple(whole[order.index(dim)] for dim in range(len(order)))).transpose(
        order
    )
    if leaf.kind == "float":
        return jax.tree.unflatten(jax.tree.structure(leaf.abstract()), [values])
    rows = values.reshape(math.prod(values.shape[: -leaf.inputs]), -1)
    step = max(1, QUANTIZED_AT_ONCE // rows.shape[1])
    blocks = [
        _quantize(jnp.asarray(rows[at : at + step]), leaf.kind, leaf.group)
        for at in range(0, len(rows), step)
    ]
    packed = jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
    if leaf.kind == "int8":
        apart = packed.values.reshape(values.shape)[(..., *cut[-leaf.inputs :])]
        packed = dataclasses.replace(packed, values=apart)
    return packed


def _expert_in(engine: Engine, path: str, repeat: int, slot: int) -> int:
    """The expert in a slot of a stacked layer, -1 for none."""
    _, stack, _, block, *_ = path.split("/")
    layer = expert_layers(engine.model, engine.moe)[int(stack), int(block)][repeat]
    expert = int(engine.placement.physical_to_logical[layer, slot])
    return -1 if expert == EMPTY else expert


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialised memory that a CPU array can take over."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


# Run directories and converted folders


def _open_run(
    path: Path,
    mesh: Mesh,
    dtype: str,
    options: dict[str, Any],
    before: Before,
    step: int | None,
    fallback: bool,
) -> LoadedModel:
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
    placement = restore.serving_placement(saved, mesh.shape["expert"])
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    engine = Engine(
        config.model, moe, mesh, placement, vocab_size=vocab_size, dtype=dtype, **options
    )
    before.look(engine, tokenizer, config.train.seq_len, packs=True)
    params, bias_LE = restore.restore_model(checkpoints, engine, step=step, fallback=fallback)
    kept = read_kept_config(path)
    ends = (tokenizer.eos_id, *(hf.eos_ids(path / "tokenizer", kept) if kept else ()))
    tables, context = tables_of(engine, bias_LE), config.train.seq_len
    return LoadedModel(
        engine,
        engine.pack(params, consume=True),
        tables,
        tokenizer,
        context,
        tuple(dict.fromkeys(ends)),
        path.name,
    )


def _open_converted(
    path: Path, mesh: Mesh, dtype: str | None, quantize: str | None, before: Before
) -> LoadedModel:
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
    placement = contiguous(
        count_moe_layers(header.model, header.moe), header.moe.num_experts, mesh.shape["expert"]
    )
    types: dict[str, Any] = {
        "dtype": header.dtype,
        "quantization": header.quantization,
        "group": header.group,
    }
    engine = Engine(
        header.model, header.moe, mesh, placement, vocab_size=header.vocab_size, **types
    )
    tokenizer = load_tokenizer(packed_header.packed_tokenizer(path, header), field="--model")
    before.look(engine, tokenizer, header.context)
    params, bias_LE = packed_checkpoint.restore_packed(
        path, engine, experts_on_host=before.expert_cache is not None
    )
    return LoadedModel(
        engine,
        params,
        tables_of(engine, bias_LE),
        tokenizer,
        header.context,
        header.eos_ids,
        header.name,
    )
