"""Writing a Hugging Face folder that transformers loads: config.json, safetensors shards, the
tokenizer's files.

Everything goes into a new folder, which becomes OUT once it is whole.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.hf.checkpoint import Layout, half_split, make_layout
from moe_jax.hf.config import CONFIG, map_config
from moe_jax.hf.safetensors import FILE_DTYPES, INDEX, SINGLE
from moe_jax.hf.tensor_names import EXPERT_AXIS, HALF_AXIS, TensorPlan
from moe_jax.utils.files import new_folder, replace_text

SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
_DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in FILE_DTYPES.items()}


def export(
    out: Path,
    family: str,
    config: dict[str, Any],
    leaf: Callable[[str], np.ndarray],
    *,
    bias_LE: np.ndarray | None = None,
    tokenizer_from: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint of `family` with this config.json to the new folder `out`.

    `leaf` gives each parameter by its path, whole, experts in logical order, in
    the type to write; it is asked for one after another. `bias_LE` are the routers' selection
    biases, f32 [MoE layers, E], of a family that has them; without it they are zeros. Files of a
    tokenizer are copied from `tokenizer_from`. A quantisation in `config` is dropped, as weights
    are written plain. Raises UserError if `out` is there or the disk is full.
    """
    config = {
        key: value
        for key, value in config.items()
        if key not in ("quantization_config", "dtype", "torch_dtype")
    }
    _, model, moe = map_config(config, f"The config of {out}")
    layout = make_layout(family, config, model, moe, model.vocab_size or 0)
    if bias_LE is not None and bias_LE.any() and layout.bias is None:
        raise UserError(
            f"{family} has no place for the routers' selection bias (moe.bias_rate): train with "
            f"moe.bias_rate=0 to export."
        )
    try:
        with new_folder(out) as part:
            writer = _Writer(part, shard_bytes)
            for name, array in _tensors(layout, leaf, bias_LE):
                writer.add(name, array)
            writer.finish()
            text = json.dumps(config | {"torch_dtype": writer.dtype}, indent=2) + "\n"
            replace_text(part / CONFIG, text, durable=True)
            for pattern in TOKENIZER_FILES if tokenizer_from else ():
                for path in sorted(Path(tokenizer_from or "").glob(pattern)):
                    shutil.copyfile(path, part / path.name)
    except OSError as error:
        why = (
            "the disk is full"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else error.strerror or str(error)
        )
        raise UserError(
            f"{out} cannot be written ({why}): free some space or name another folder."
        ) from None


def _tensors(
    layout: Layout, leaf: Callable[[str], np.ndarray], bias_LE: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file, contiguous, in memory of its own."""
    for path, plan in layout.plans.items():
        yield from _split(plan, leaf(path), layout.rotated)
    if layout.bias is not None:
        bias = layout.bias.parameter
        rows = np.zeros(bias.stacked_shape, np.float32) if bias_LE is None else bias_LE
        for layer, row_E in zip(bias.layers or (), rows.astype(np.float32), strict=True):
            yield layout.bias.tensor(layer, None, None), row_E


def _split(plan: TensorPlan, array: np.ndarray, rotated: int) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that a parameter becomes."""
    parameter = plan.parameter
    if array.shape != parameter.stacked_shape:
        raise ValueError(
            f"{parameter.path.text} has the shape {array.shape}, not {parameter.stacked_shape}"
        )
    apart = {EXPERT_AXIS: plan.by_expert, HALF_AXIS: plan.by_half}  # a tensor for each entry
    axes = [axis for axis in parameter.axes if not apart.get(axis)]
    order = [axes.index(axis) for axis in plan.axes]
    turned = (
        np.argsort(half_split(parameter.shape[-1], rotated)) if plan.stored.interleaved else None
    )
    numbers = [range(plan.sizes[axis]) if is_apart else [None] for axis, is_apart in apart.items()]
    for at, layer in enumerate(parameter.layers or (None,)):
        of_layer = array if layer is None else array[at]
        for expert, half in itertools.product(*numbers):
            # Those that are apart have a number, and the dims that are left keep their order.
            number = {EXPERT_AXIS: expert, HALF_AXIS: half}
            index = tuple(
                number[axis] if apart.get(axis) else slice(None) for axis in parameter.axes
            )
            piece = of_layer[index]
            piece = piece if turned is None else piece.take(turned, axis=-1)
            tensor = np.array(piece.transpose(order), order="C").reshape(plan.shape)
            yield plan.tensor(layer, expert, half), tensor


class _Writer:
    """Gathers tensors and writes a shard whenever enough are there."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.dtype = ""
        self._waiting: dict[str, np.ndarray] = {}
        self._bytes = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes a contiguous tensor; the first one's type is the config's."""
        self.dtype = self.dtype or array.dtype.name
        if self._waiting and self._bytes + array.nbytes > self.shard_bytes:
            self._flush()
        self._waiting[name] = array
        self._bytes += array.nbytes
        self._total += array.nbytes

    def finish(self) -> None:
        """Writes what is left, and the index if there is more than one shard."""
        self._flush()
        count = len(self._shards)
        final = (
            [SINGLE]
            if count == 1
            else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        )
        for number, name in enumerate(final):
            (self.folder / f"{number}.writing").rename(self.folder / name)
        if count > 1:
            weights = {
                tensor: name
                for name, tensors in zip(final, self._shards, strict=True)
                for tensor in tensors
            }
            index = {"metadata": {"total_size": self._total}, "weight_map": weights}
            text = json.dumps(index, indent=2) + "\n"
            replace_text(self.folder / INDEX, text, durable=True)

    def _flush(self) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, array in self._waiting.items():
            offsets = [at, at + array.nbytes]
            header[name] = {
                "dtype": _DTYPE_NAMES[array.dtype],
                "shape": list(array.shape),
                "data_offsets": offsets,
            }
            at += array.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
        with (self.folder / f"{len(self._shards)}.writing").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in self._waiting.values():
                file.write(array.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        self._shards.append(list(self._waiting))
        self._waiting, self._bytes = {}, 0
