"""A Hugging Face checkpoint as the parameters of our model: any part of any of them, read from its
byte ranges alone.

checkpoint = open_checkpoint(folder)    # headers only; raises UserError if anything is amiss
part = (slice(None), np.array([3, 7]), slice(None), slice(None))
rows = checkpoint.leaf("stacks/0/blocks/0/mlp/experts/down", part)
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.errors import UserError
from moe_jax.hf import mxfp4
from moe_jax.hf.config import Architecture, read_config
from moe_jax.hf.families import FAMILIES
from moe_jax.hf.safetensors import FILE_DTYPES, Shards
from moe_jax.hf.tensor_names import (
    EMBEDDING,
    EXPERT_AXIS,
    FUSED_GATE_UP,
    HALF_AXIS,
    HEAD,
    SELECTION_BIAS,
    TOP,
    Names,
    TensorPlan,
    plan_tensors,
)
from moe_jax.models.layer_pattern import layer_kinds
from moe_jax.models.parameters import Parameter, parameters
from moe_jax.models.paths import ParameterPath
from moe_jax.utils.progress import say_once

LeafIndex = tuple[slice | np.ndarray, ...]
LAYER_AXIS = "layers"  # of the layers in front of a stacked parameter's own dims

# Buffers that old versions saved, and that follow from the config.
_BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"


class Layout(NamedTuple):
    """Which tensors the parameters of a model are, for one family."""

    plans: dict[str, TensorPlan]  # by path
    bias: TensorPlan | None  # the selection biases, in the order of the MoE layers
    # entries at the end of a latent head's query, and of the key beside the latent, that are
    # rotated
    rotated: int


def make_layout(
    family: str,
    config: dict[str, Any],
    model: ModelConfig,
    moe: MoEConfig,
    vocab_size: int,
    changes: Names | None = None,
) -> Layout:
    """Where the parameters are by the family's table, with `changes` to it. Raises UserError if the
    family has no tensor for a parameter of the model.
    """
    names: Names = TOP | FAMILIES[family].names(config) | (changes or {})
    plans = {}
    for path, parameter in parameters(model, moe, vocab_size).items():
        plan = plan_tensors(parameter, names)
        if plan is None:
            raise UserError(
                f"{family} has no tensor for {path}: this model does not fit that family."
            )
        plans[path] = plan
    moe_layers = tuple(layer for layer, kind in enumerate(layer_kinds(model, moe)) if kind.moe)
    selection_path = ParameterPath.parse(SELECTION_BIAS)
    selection_bias = Parameter(selection_path, ("experts",), (moe.num_experts,), moe_layers)
    bias = plan_tensors(selection_bias, names) if moe_layers else None
    return Layout(plans, bias, model.latent.rope_width)


def open_checkpoint(folder: Path | str, shards: Shards | None = None) -> Checkpoint:
    """Reads the config and all headers, and checks that they agree. Raises UserError, one sentence,
    where they do not.

    `shards` are the tensors, if they are not in the folder.
    """
    described = read_config(folder)
    shards = shards or Shards(described.folder)
    described, changes = _by_the_files(described, shards)
    layout = make_layout(
        described.family,
        described.config,
        described.model,
        described.moe,
        described.vocab_size,
        changes,
    )
    _check(described, layout, shards)
    return Checkpoint(described, layout, shards)


def _by_the_files(described: Architecture, shards: Shards) -> tuple[Architecture, Names]:
    """The model and changes to its family's table, by what only the tensors say: whether experts
    are fused, and whether the head is the embedding.

    Where the config ties the two, transformers takes either one if the other is not there, and does
    not tie two that differ.
    """
    changes: Names = {}
    fused = FAMILIES[described.family].fused or {}
    if any(name.endswith(f".{FUSED_GATE_UP}") for name in shards.entries):
        changes |= fused
    if not described.model.tied_embeddings or HEAD not in shards.entries:
        return described, changes
    if EMBEDDING not in shards.entries:
        return described, changes | {"embedding": HEAD}
    if shards.same(EMBEDDING, HEAD):
        return described, changes
    say_once(
        f"{described.folder}: config.json ties the output head to the embedding, but {HEAD} is "
        f"not {EMBEDDING}: both are used, as in transformers."
    )
    model = dataclasses.replace(described.model, tied_embeddings=False)
    config = described.config | {"tie_word_embeddings": False}
    return described._replace(model=model, config=config), changes


class Checkpoint:
    """An open checkpoint; the attributes of `Architecture` are its own."""

    def __init__(self, architecture: Architecture, layout: Layout, shards: Shards):
        (
            self.folder,
            self.config,
            self.family,
            self.model,
            self.moe,
            self.vocab_size,
            self.context,
            self.eos_ids,
        ) = architecture
        self._layout, self._shards = layout, shards
        self._dtypes: dict[str, np.dtype] = {}

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far."""
        return self._shards.bytes_read

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by its path, the layers in front where it has any."""
        return {path: plan.parameter.stacked_shape for path, plan in self._layout.plans.items()}

    def dtype(self, path: str) -> np.dtype:
        """The type in which `leaf` gives a parameter: the file's, bf16 for MXFP4, f32 where layers
        or experts differ.
        """
        if path not in self._dtypes:
            plan = self._layout.plans[path]
            if plan.stored.mxfp4:
                dtypes = {np.dtype(ml_dtypes.bfloat16)}
            else:
                dtypes = {self._shards.dtype(name) for name in plan.tensors()}
            self._dtypes[path] = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        return self._dtypes[path]

    def file_bytes(self, path: str) -> int:
        """Bytes that the tensors of a parameter take in the files."""
        plan = self._layout.plans[path]
        parts = ("_blocks", "_scales") if plan.stored.mxfp4 else ("",)
        return sum(self._shards.nbytes(name + part) for name in plan.tensors() for part in parts)

    def leaf(self, path: str, index: LeafIndex | None = None) -> np.ndarray:
        """A part of a parameter; the whole without an `index`.

        `index` has a slice of step 1 for each dim of the parameter; that of the experts may also be
        an int array of expert ids, of which -1 gives zeros. What comes back is a transposed view of
        memory in the order of the file, so that a caller who wants the outputs first needs no copy.
        """
        plan = self._layout.plans[path]
        shape = plan.parameter.stacked_shape
        stacked = plan.parameter.layers is not None
        axes = (LAYER_AXIS,) * stacked + plan.parameter.axes
        parts = dict(zip(axes, index or (slice(None),) * len(shape), strict=True))
        entries = {
            axis: _entries(axis, part, size)
            for (axis, part), size in zip(parts.items(), shape, strict=True)
        }
        # Memory is in the order of the file: layers, experts, gate and up where these are apart,
        # then the tensor.
        inner = [axis for axis in plan.axes if axis != EXPERT_AXIS]
        outer = [
            axis
            for axis in (LAYER_AXIS, EXPERT_AXIS, HALF_AXIS)
            if axis in axes and axis not in inner
        ]
        size = [len(entries[axis]) for axis in outer + inner]
        places = list(itertools.product(*(range(len(entries[axis])) for axis in outer)))
        out = np.empty(size, self.dtype(path))
        for place in places:
            at: dict[str, int] = {
                axis: int(entries[axis][number]) for axis, number in zip(outer, place, strict=True)
            }
            part = (
                0
                if at.get(EXPERT_AXIS) == -1
                else self._read(plan, at, {axis: entries[axis] for axis in inner})
            )
            if len(places) == 1 and isinstance(part, np.ndarray):
                # as it was read: a large tensor is in memory once
                out = part.astype(out.dtype, copy=False).reshape(size)
            else:
                out[place] = part
        return out.transpose([(outer + inner).index(axis) for axis in axes])

    def bias_LE(self) -> np.ndarray | None:
        """The selection bias of each MoE layer, f32 [MoE layers, E]; None if the family has
        none.
        """
        plan = self._layout.bias
        if plan is None:
            return None
        whole = tuple(slice(0, size) for size in plan.shape)
        rows = [self._shards.read(name, plan.shape, whole) for name in plan.tensors()]
        return np.stack(rows).astype(np.float32)

    def _read(
        self, plan: TensorPlan, at: dict[str, int], entries: dict[str, np.ndarray]
    ) -> np.ndarray:
        """What one tensor has of a parameter, dims as in the file and not merged; `at` says where
        it is in the outer ones.
        """
        sizes, layers = plan.sizes, plan.parameter.layers
        layer = None if layers is None else layers[at[LAYER_AXIS]]
        expert = at.get(EXPERT_AXIS)
        name = plan.tensor(layer, expert, at.get(HALF_AXIS))
        box = [
            slice(expert, expert + 1)
            if axis == EXPERT_AXIS and expert is not None
            else _cut(entries[axis])
            for axis in plan.axes
        ]
        turned = plan.axes.index(plan.parameter.axes[-1]) if plan.stored.interleaved else None
        if turned is not None:
            box[turned] = slice(0, sizes[plan.axes[turned]])  # its entries change places
        shape = tuple(sizes[axis] for axis in plan.axes)
        part = (
            self._read_mxfp4(name, shape, box)
            if plan.stored.mxfp4
            else self._shards.read(name, shape, tuple(box))
        )
        if turned is not None:
            axis = plan.axes[turned]
            order = half_split(sizes[axis], self._layout.rotated)
            part = part.take(order[_cut(entries[axis])], axis=turned)
        return part.reshape([len(entries[axis]) for axis in plan.axes if axis != EXPERT_AXIS])

    def _read_mxfp4(self, name: str, shape: tuple[int, ...], box: list[slice]) -> np.ndarray:
        """A part of a quantised tensor: whole blocks of its last dim are read and the rest of them
        cut off.
        """
        *rows, last = box
        first, end = last.start // mxfp4.BLOCK_SIZE, -(-last.stop // mxfp4.BLOCK_SIZE)
        grid, blocks = (*shape[:-1], shape[-1] // mxfp4.BLOCK_SIZE), (*rows, slice(first, end))
        half = mxfp4.BLOCK_SIZE // 2
        packed = self._shards.read(f"{name}_blocks", (*grid, half), (*blocks, slice(0, half)))
        values = mxfp4.decode(packed, self._shards.read(f"{name}_scales", grid, blocks))
        return values[
            ..., last.start - first * mxfp4.BLOCK_SIZE : last.stop - first * mxfp4.BLOCK_SIZE
        ]


def half_split(width: int, rotated: int) -> np.ndarray:
    """Where entry i of a head, its rotated pairs half a head apart, is among `width` whose last
    `rotated` alternate.
    """
    plain = width - rotated
    return np.concatenate(
        [np.arange(plain), np.arange(plain, width, 2), np.arange(plain + 1, width, 2)]
    )


def _entries(axis: str, part: slice | np.ndarray, size: int) -> np.ndarray:
    """The entries that an index picks of a dim."""
    if isinstance(part, slice) and part.step in (None, 1):
        return np.arange(size)[part]
    if axis != EXPERT_AXIS or isinstance(part, slice):
        raise ValueError(
            f"dimension {axis} is indexed by {part}, where a slice of step 1 is needed"
        )
    return np.asarray(part)


def _cut(entries: np.ndarray) -> slice:
    return slice(int(entries[0]), int(entries[-1]) + 1) if len(entries) else slice(0, 0)


def _check(described: Architecture, layout: Layout, shards: Shards) -> None:
    """Every tensor that the config calls for is there, in the right shape and a type that we read,
    and no other.
    """
    wanted = dict(_wanted(layout, str(described.folder)))
    if missing := wanted.keys() - shards.entries.keys():
        raise UserError(
            f"{described.folder} lacks tensors that its config.json calls for, {_some(missing)}: "
            f"download the checkpoint again."
        )
    fine = "|".join(
        (
            _BUFFERS,
            FAMILIES[described.family].unused(described.config),
            *((re.escape(HEAD),) * described.model.tied_embeddings),
        )
    )
    if unexpected := {
        name for name in shards.entries.keys() - wanted.keys() if not re.fullmatch(fine, name)
    }:
        raise UserError(
            f"{described.folder} holds tensors that a {described.family} model does not have, "
            f"{_some(unexpected)}: check its config.json."
        )
    for name, (shape, quantised) in wanted.items():
        entry = shards.entries[name]
        if entry.shape != shape:
            raise UserError(
                f"{described.folder}: {name} has the shape {list(entry.shape)} where config.json "
                f"calls for {list(shape)}: "
                "take both from the same checkpoint."
            )
        if entry.dtype not in FILE_DTYPES or (entry.dtype == "U8") != quantised:
            raise UserError(
                f"{described.folder}: {name} has the type {entry.dtype}, which is not supported: "
                f"take a checkpoint in BF16."
            )


def _wanted(layout: Layout, folder: str) -> Iterable[tuple[str, tuple[tuple[int, ...], bool]]]:
    """Names of the file's tensors, their shapes, and whether they are quantised."""
    for plan in (*layout.plans.values(), *((layout.bias,) if layout.bias else ())):
        shape = plan.shape
        for name in plan.tensors():
            if not plan.stored.mxfp4:
                yield name, (shape, False)
                continue
            if shape[-1] % mxfp4.BLOCK_SIZE:
                raise UserError(
                    f"{folder}: the {shape[-1]} columns of {name} are not whole blocks of MXFP4: "
                    f"check its config.json."
                )
            grid = (*shape[:-1], shape[-1] // mxfp4.BLOCK_SIZE)
            yield f"{name}_blocks", ((*grid, mxfp4.BLOCK_SIZE // 2), True)
            yield f"{name}_scales", (grid, True)


def _some(names: Iterable[str]) -> str:
    """The first few of a set of names, and how many more."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
