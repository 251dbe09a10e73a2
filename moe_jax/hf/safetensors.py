"""The safetensors files of a folder: their headers, and parts of their tensors by byte range.

A file is an 8-byte little-endian length, a JSON header of that length that gives each tensor's
type, shape and place, and the bytes. Nothing else is ever opened: pickles are refused. Only what is
asked for is read, and counted.

The safetensors library reads slices too, but only along a tensor's own dims, where we cut heads and
halves that a file has merged into one; it maps whole files, and says of a damaged header neither
which file it is nor what to do.
"""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.errors import UserError
from moe_jax.utils.files import download_again

FILE_DTYPES: dict[str, Any] = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "BF16": ml_dtypes.bfloat16,
    "U8": "u1",
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_HEADER = 1 << 28
_COMPARED_AT_ONCE = 1 << 22  # values


class Entry(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: str  # as the header spells it
    shape: tuple[int, ...]
    start: int  # byte in the file


class Shards:
    """All tensors of a folder by name; `bytes_read` counts what was read of them."""

    def __init__(self, source: Path | dict[str, Entry]):
        """Reads every header of a folder; or takes what headers said whose files are elsewhere.

        Raises UserError for files that are missing, damaged or cut short.
        """
        self.bytes_read, self._elsewhere = 0, isinstance(source, dict)
        self._counting = threading.Lock()
        self.entries = source if isinstance(source, dict) else _all_entries(source)

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor's values."""
        return np.dtype(FILE_DTYPES[self.entries[name].dtype])

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in its file."""
        return math.prod(self.entries[name].shape) * self.dtype(name).itemsize

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors have one shape and the same values; not counted as read. Values that
        are elsewhere are taken to be the same.
        """
        first, second = self.entries[name], self.entries[other]
        if first.shape != second.shape or not {first.dtype, second.dtype} <= FILE_DTYPES.keys():
            return False
        if self._elsewhere:
            return True
        size = math.prod(first.shape)
        for start in range(0, size, _COMPARED_AT_ONCE):
            count = min(_COMPARED_AT_ONCE, size - start)
            parts = []
            for entry, dtype in ((first, self.dtype(name)), (second, self.dtype(other))):
                offset = entry.start + start * dtype.itemsize
                part = np.fromfile(entry.path, dtype, count, offset=offset)
                # f64 holds what tensors of different types have in common
                parts.append(part if first.dtype == second.dtype else part.astype(np.float64))
            if not np.array_equal(parts[0], parts[1]):
                return False
        return True

    def read(self, name: str, shape: tuple[int, ...], box: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor in memory of its own: `box` cuts the tensor after it is reshaped to
        `shape`. Threads may read at once.

        Slices have a step of 1 and lie within the shape.
        """
        entry, dtype = self.entries[name], self.dtype(name)
        lengths = tuple(part.stop - part.start for part in box)
        with self._counting:
            self.bytes_read += math.prod(lengths) * dtype.itemsize
        # Elements of the box are neighbours in the file if only its first dimension that counts is
        # cut.
        first = next((axis for axis, length in enumerate(lengths) if length != 1), len(lengths))
        if all(
            length == size
            for length, size in zip(lengths[first + 1 :], shape[first + 1 :], strict=True)
        ):
            strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
            skipped = sum(part.start * stride for part, stride in zip(box, strides, strict=True))
            offset = entry.start + skipped * dtype.itemsize
            return np.fromfile(entry.path, dtype, math.prod(lengths), offset=offset).reshape(
                lengths
            )
        # Pieces of rows: mapped, so that the kernel fetches their pages alone, and unmapped again
        # with the copy made.
        return np.array(
            np.memmap(entry.path, dtype, mode="r", offset=entry.start, shape=shape)[box]
        )


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises UserError if it is no safetensors file, or shorter than its
    header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= _LONGEST_HEADER:
            raise UserError(f"{path} is not a safetensors file: {download_again(path)}.")
        if size < 8 + length:
            raise _truncated(path, size, 8 + length)
        text = file.read(length)
    try:
        entries = {
            name: _entry(path, 8 + length, value)
            for name, value in json.loads(text).items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} has a header that cannot be read ({error}): download it again."
        ) from None
    end = max((entry.start + nbytes for entry, nbytes in entries.values()), default=8 + length)
    if size < end:
        raise _truncated(path, size, end)
    return {name: entry for name, (entry, _) in entries.items()}


def _entry(path: Path, data: int, value: dict[str, Any]) -> tuple[Entry, int]:
    """One line of a header, and the bytes that it takes. Raises ValueError where its parts
    disagree.
    """
    shape, (start, end) = tuple(int(size) for size in value["shape"]), value["data_offsets"]
    itemsize = (
        np.dtype(FILE_DTYPES[value["dtype"]]).itemsize if value["dtype"] in FILE_DTYPES else None
    )
    if not 0 <= start <= end or (
        itemsize is not None and end - start != math.prod(shape) * itemsize
    ):
        raise ValueError(f"offsets {start} to {end} do not fit the shape {list(shape)}")
    return Entry(path, value["dtype"], shape, data + start), end - start


def _truncated(path: Path, size: int, whole: int) -> UserError:
    return UserError(
        f"{path} is truncated, {size:,} bytes where its header calls for {whole:,}: download it "
        f"again."
    )


def _all_entries(folder: Path) -> dict[str, Entry]:
    """The tensors of a folder; a single file goes before an index, as in transformers."""
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    pickles = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )
    if pickles:
        raise UserError(
            f"{folder} holds its weights as pickles ({pickles[0]}), which are never loaded: "
            f"convert them to safetensors."
        )
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds {others[0]} and neither {SINGLE} nor {INDEX}: download what is "
            f"missing, or take the form of this model that transformers loads."
        )
    raise UserError(
        f"{folder} holds neither {SINGLE} nor {INDEX}: name a folder with a whole checkpoint."
    )


def _indexed(folder: Path) -> dict[str, Entry]:
    """The tensors that the index names, each from the shard that it assigns the tensor to.

    What else a shard holds is passed over, such as an older copy of another shard's tensor.
    """
    index = folder / INDEX
    try:
        shard_of = {
            name: str(shard) for name, shard in json.loads(index.read_bytes())["weight_map"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{index} cannot be read as an index of shards: {download_again(index)}."
        ) from None
    headers = {shard: _shard_header(folder, shard) for shard in sorted(set(shard_of.values()))}
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise UserError(
                f"{folder / shard} does not hold {name}, which {INDEX} assigns to it: download "
                f"the shard and the index again."
            )
    return {name: headers[shard][name] for name, shard in shard_of.items()}


def _shard_header(folder: Path, shard: str) -> dict[str, Entry]:
    """The tensors of a shard that an index names."""
    if Path(shard).name != shard or not shard.endswith(".safetensors"):
        raise UserError(
            f"{folder / INDEX} names {shard}, which is not a safetensors file of its folder: "
            f"download it again."
        )
    if not (folder / shard).is_file():
        raise UserError(
            f"{folder / shard} is missing, though {INDEX} names it: download the rest of the "
            f"checkpoint."
        )
    return read_header(folder / shard)
