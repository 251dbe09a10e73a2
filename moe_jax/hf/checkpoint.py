"""A Hugging Face checkpoint as the parameter tree of our model: any part of any leaf, read from its
byte ranges alone.

checkpoint = open_checkpoint(folder)    # headers only; raises UserError if anything is amiss
part = (slice(None), np.array([3, 7]), slice(None), slice(None))
rows = checkpoint.leaf("stacks/0/blocks/0/mlp/experts/down", part)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.errors import UserError
from moe_jax.hf import mxfp4
from moe_jax.hf.config import Architecture, read_config
from moe_jax.hf.families import FAMILIES
from moe_jax.hf.safetensors import FILE_DTYPES, Shards
from moe_jax.hf.tensor_names import SELECTION_BIAS, TOP, Names, TensorPlan, plan_tensors
from moe_jax.models.layer_pattern import layer_kinds
from moe_jax.models.parameters import Leaf, leaves, sizes

LeafIndex = tuple[slice | np.ndarray, ...]

# Buffers that old versions saved, and that follow from the config.
_BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"


class Layout(NamedTuple):
    """Which tensors the leaves of a model are, for one family."""

    plans: dict[str, TensorPlan]  # by path
    bias: TensorPlan | None  # the selection biases, in the order of the MoE layers
    size: dict[str, int]
    experts: int
    # entries at the end of a latent head's query, and of the key beside the latent, that are
    # rotated
    rotated: int


def make_layout(
    family: str, config: dict, model: ModelConfig, moe: MoEConfig, vocab_size: int
) -> Layout:
    """Raises UserError if the family has no tensor for a leaf of the model."""
    names: Names = TOP | FAMILIES[family].names(config)
    plans = {}
    for path, leaf in leaves(model, moe).items():
        found = plan_tensors(leaf, names)
        if found is None:
            raise UserError(
                f"{family} has no tensor for {path}: this model does not fit that family."
            )
        plans[path] = found
    moe_layers = tuple(layer for layer, kind in enumerate(layer_kinds(model, moe)) if kind.moe)
    bias = plan_tensors(Leaf(SELECTION_BIAS, ("E",), moe_layers), names) if moe_layers else None
    return Layout(
        plans, bias, sizes(model, moe, vocab_size), moe.num_experts, model.latent.rope_width
    )


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Reads the config and all headers, and checks that they agree. Raises UserError, one sentence,
    where they do not.
    """
    found = read_config(folder)
    layout = make_layout(found.family, found.config, found.model, found.moe, found.vocab_size)
    shards = Shards(found.folder)
    _check(found, layout, shards)
    return Checkpoint(found, layout, shards)


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
        """The shape of every leaf by its path, the layers in front where it has any."""
        return {
            path: _shape(found, self._layout.size) for path, found in self._layout.plans.items()
        }

    def dtype(self, path: str) -> np.dtype:
        """The type in which `leaf` gives a leaf: the file's, bf16 for MXFP4, f32 where layers or
        experts differ.
        """
        if path not in self._dtypes:
            found = self._layout.plans[path]
            if found.stored.mxfp4:
                dtypes = {np.dtype(ml_dtypes.bfloat16)}
            else:
                dtypes = {self._shards.dtype(name) for name in found.tensors(self._layout.experts)}
            self._dtypes[path] = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        return self._dtypes[path]

    def file_bytes(self, path: str) -> int:
        """Bytes that the tensors of a leaf take in the files."""
        found = self._layout.plans[path]
        parts = ("_blocks", "_scales") if found.stored.mxfp4 else ("",)
        return sum(
            self._shards.nbytes(name + part)
            for name in found.tensors(self._layout.experts)
            for part in parts
        )

    def leaf(self, path: str, index: LeafIndex | None = None) -> np.ndarray:
        """A part of a leaf; the whole without an `index`.

        `index` has a slice of step 1 for each dimension of the leaf; that of the experts may also
        be an int array of expert ids, of which -1 gives zeros. What comes back is a transposed view
        of memory in the order of the file, so that a caller who wants the outputs first needs no
        copy.
        """
        found = self._layout.plans[path]
        shape = _shape(found, self._layout.size)
        dims = (("L",) if found.leaf.layers else ()) + found.leaf.dims
        parts = dict(zip(dims, index or (slice(None),) * len(shape), strict=True))
        ranges = {
            dim: _entries(dim, part, size)
            for (dim, part), size in zip(parts.items(), shape, strict=True)
        }
        # Memory is in the order of the file: layers, experts, gate and up where these are apart,
        # then the tensor.
        inner = [dim for group in found.dims for dim in group if dim != "P"]
        outer = [dim for dim in ("L", "P", "C") if dim in dims and dim not in inner]
        size, places = (
            [len(ranges[dim]) for dim in outer + inner],
            list(itertools.product(*(range(len(ranges[dim])) for dim in outer))),
        )
        out = np.empty(size, self.dtype(path))
        for place in places:
            at: dict[str, int] = {
                dim: int(ranges[dim][number]) for dim, number in zip(outer, place, strict=True)
            }
            part = (
                0
                if at.get("P") == -1
                else self._read(found, at, {dim: ranges[dim] for dim in inner})
            )
            if len(places) == 1 and isinstance(part, np.ndarray):
                out = part.astype(out.dtype, copy=False).reshape(
                    size
                )  # as it was read: a large tensor is in memory once
            else:
                out[place] = part
        return out.transpose([(outer + inner).index(dim) for dim in dims])

    def bias_LE(self) -> np.ndarray | None:
        """The selection bias of each MoE layer, f32 [MoE layers, E]; None if the family has
        none.
        """
        found = self._layout.bias
        if found is None:
            return None
        whole = (slice(0, self._layout.experts),)
        rows = [
            self._shards.read(name, found.shape(self._layout.size), whole)
            for name in found.tensors(self._layout.experts)
        ]
        return np.stack(rows).astype(np.float32)

    def _read(
        self, found: TensorPlan, at: dict[str, int], ranges: dict[str, np.ndarray]
    ) -> np.ndarray:
        """What one tensor has of a leaf, dimensions as in the file but not merged; `at` says where
        it is in the outer ones.
        """
        size = self._layout.size
        layer = None if found.leaf.layers is None else found.leaf.layers[at["L"]]
        name = found.tensor(layer, at.get("P"), at.get("C"))
        dims = [dim for group in found.dims for dim in group]
        box = [slice(at["P"], at["P"] + 1) if dim == "P" else _cut(ranges[dim]) for dim in dims]
        turned = dims.index(found.leaf.dims[-1]) if found.stored.interleaved else None
        if turned is not None:
            box[turned] = slice(0, size[dims[turned]])  # its entries change places
        shape = tuple(size[dim] for dim in dims)
        part = (
            self._read_mxfp4(name, shape, box)
            if found.stored.mxfp4
            else self._shards.read(name, shape, tuple(box))
        )
        if turned is not None:
            order = half_split(size[dims[turned]], self._layout.rotated)
            part = part.take(order[_cut(ranges[dims[turned]])], axis=turned)
        return part.reshape([len(ranges[dim]) for dim in dims if dim != "P"])

    def _read_mxfp4(self, name: str, shape: tuple[int, ...], box: list[slice]) -> np.ndarray:
        """A part of a quantised tensor: whole blocks of its last dimension are read and the rest of
        them cut off.
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


def _shape(found: TensorPlan, size: dict[str, int]) -> tuple[int, ...]:
    layers = () if found.leaf.layers is None else (len(found.leaf.layers),)
    return layers + tuple(size[dim] for dim in found.leaf.dims)


def _entries(dim: str, part: slice | np.ndarray, size: int) -> np.ndarray:
    """The entries that an index picks of a dimension."""
    if isinstance(part, slice) and part.step in (None, 1):
        return np.arange(size)[part]
    if dim != "P" or isinstance(part, slice):
        raise ValueError(f"dimension {dim} is indexed by {part}, where a slice of step 1 is needed")
    return np.asarray(part)


def _cut(entries: np.ndarray) -> slice:
    return slice(int(entries[0]), int(entries[-1]) + 1) if len(entries) else slice(0, 0)


def _check(found: Architecture, layout: Layout, shards: Shards) -> None:
    """Every tensor that the config calls for is there, in the right shape and a type that we read,
    and no other.
    """
    wanted = dict(_wanted(layout, str(found.folder)))
    if missing := wanted.keys() - shards.entries.keys():
        raise UserError(
            f"{found.folder} lacks tensors that its config.json calls for, {_some(missing)}: "
            f"download the checkpoint again."
        )
    fine = "|".join(
        (
            _BUFFERS,
            FAMILIES[found.family].unused(found.config),
            *(("lm_head.weight",) * found.model.tied_embeddings),
        )
    )
    if unexpected := {
        name for name in shards.entries.keys() - wanted.keys() if not re.fullmatch(fine, name)
    }:
        raise UserError(
            f"{found.folder} holds tensors that a {found.family} model does not have, "
            f"{_some(unexpected)}: check its config.json."
        )
    for name, (shape, quantised) in wanted.items():
        entry = shards.entries[name]
        if entry.shape != shape:
            raise UserError(
                f"{found.folder}: {name} has the shape {list(entry.shape)} where config.json "
                f"calls for {list(shape)}: "
                "take both from the same checkpoint."
            )
        if entry.dtype not in FILE_DTYPES or (entry.dtype == "U8") != quantised:
            raise UserError(
                f"{found.folder}: {name} has the type {entry.dtype}, which is not supported: take "
                f"a checkpoint in BF16."
            )


def _wanted(layout: Layout, folder: str) -> Iterable[tuple[str, tuple[tuple[int, ...], bool]]]:
    """Names of the file's tensors, their shapes, and whether they are quantised."""
    for found in (*layout.plans.values(), *((layout.bias,) if layout.bias else ())):
        shape = found.shape(layout.size)
        for name in found.tensors(layout.experts):
            if not found.stored.mxfp4:
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
