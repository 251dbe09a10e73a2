"""Writing a Hugging Face folder that transformers loads: config.json, safetensors shards, the
tokenizer's files.

Everything goes into `OUT.part`, which is renamed once it is whole, so that OUT is never half a
checkpoint.
"""

from __future__ import annotations

import errno
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
from moe_jax.hf.tensor_names import TensorPlan

SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template*.jinja",
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

    `leaf` gives each leaf of the parameter tree by its path, whole, experts in logical order, in
    the type to write; it is asked for one after another. `bias_LE` are the routers' selection
    biases, f32 [MoE layers, E], of a family that has them; without it they are zeros. Files of a
    tokenizer are copied from `tokenizer_from`. A quantisation in `config` is dropped, as weights
    are written plain. Raises UserError if `out` is there or the disk is full.
    """
    if out.exists():
        raise UserError(f"{out} is there already: name a folder that is not, or remove it.")
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
    part = out.with_name(out.name + ".part")
    try:
        if part.exists():
            shutil.rmtree(part)  # left by an export that was killed
        part.mkdir(parents=True)
        writer = _Writer(part, shard_bytes)
        for name, array in _tensors(layout, leaf, bias_LE):
            writer.add(name, array)
        writer.finish()
        _write_text(
            part / CONFIG, json.dumps(config | {"torch_dtype": writer.dtype}, indent=2) + "\n"
        )
        for pattern in TOKENIZER_FILES if tokenizer_from else ():
            for path in sorted(Path(tokenizer_from or "").glob(pattern)):
                shutil.copyfile(path, part / path.name)
        part.rename(out)
    except OSError as error:
        why = (
            "the disk is full"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else error.strerror or str(error)
        )
        raise UserError(
            f"{out} cannot be written ({why}): free some space or name another folder."
        ) from None
    finally:
        if part.exists():
            shutil.rmtree(part)


def _tensors(
    layout: Layout, leaf: Callable[[str], np.ndarray], bias_LE: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file, contiguous, in memory of its own."""
    for path, found in layout.plans.items():
        yield from _split(found, leaf(path), layout)
    if layout.bias is not None:
        layers = layout.bias.leaf.layers or ()
        rows = (
            np.zeros((len(layers), layout.experts), np.float32)
            if bias_LE is None
            else bias_LE.astype(np.float32)
        )
        for layer, row_E in zip(layers, rows, strict=True):
            yield layout.bias.tensor(layer, None, None), row_E


def _split(
    found: TensorPlan, array: np.ndarray, layout: Layout
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that a leaf becomes."""
    whole = tuple(layout.size[dim] for dim in found.leaf.dims)
    layers = found.leaf.layers
    if array.shape != (whole if layers is None else (len(layers), *whole)):
        raise ValueError(
            f"{found.leaf.name} has the shape {array.shape}, not {whole} in each of {layers}"
        )
    dims = [
        dim
        for dim in found.leaf.dims
        if not (dim == "P" and found.by_expert) and not (dim == "C" and found.by_half)
    ]
    axes = [dims.index(dim) for group in found.dims for dim in group]
    turned = np.argsort(half_split(whole[-1], layout.rotated)) if found.stored.interleaved else None
    for at, layer in enumerate(layers or (None,)):
        of_layer = array if layer is None else array[at]
        for expert in range(layout.experts if found.by_expert else 1):
            for half in range(len(found.names)):
                # C stands behind P and D in every leaf, and those that are apart are in front of
                # what is left.
                index = tuple(
                    expert
                    if dim == "P" and found.by_expert
                    else half
                    if dim == "C" and found.by_half
                    else slice(None)
                    for dim in found.leaf.dims
                )
                piece = of_layer[index]
                piece = piece if turned is None else piece.take(turned, axis=-1)
                name = found.tensor(
                    layer, expert if found.by_expert else None, half if found.by_half else None
                )
                yield (
                    name,
                    np.array(piece.transpose(axes), order="C").reshape(found.shape(layout.size)),
                )


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
            _write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

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


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
