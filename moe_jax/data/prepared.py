"""A prepared folder: tokenized text, stored once and memory-mapped by every process.

    OUT/prepared.json            what it was made of and by which tokenizer, and the size and the
                                 SHA-256 of every file; a hash of itself, checked at each start
    OUT/plan.json                what decided that, by which a preparation is gone on with
    OUT/00000.tokens.npy         uint16 or uint32: documents, each followed by its end
    OUT/00000.starts.npy         int64: where each document starts in it
    OUT/00000.keys.npy           uint8 [documents, 32]: SHA-256 of each document's content
    OUT/00000.counted.npy        bool, with conversations alone: whether a token counts as a target
    OUT/split.train.npy, OUT/split.validation.npy    which of it is which: see packing.py

The format is numpy's: a window of any length begins anywhere in the tokens, so no record of
ArrayRecord would be what a step reads, and a record would be copied where a map is not.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config.schema import DataConfig
from moe_jax.data.hold_out import Split
from moe_jax.data.packing import Extents, Shard, Stream
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.utils.files import replace_text

PREPARED_INDEX = "prepared.json"
PLAN = "plan.json"
FORMAT = 1
_OPEN = 48  # shards mapped at a time: each keeps up to four descriptors, and macOS allows 256
_AGAIN = "prepare it again (moe-jax data prepare)"


@dataclass(frozen=True)
class Prepared:
    """An opened folder."""

    stream: Stream
    hash: str
    """As `Corpus.hash`."""
    index: dict[str, Any]
    split: Split
    """The one that is stored; `split_for` of prepare.py gives any."""


def is_prepared(path: Path) -> bool:
    """Whether a folder was written by `moe-jax data prepare`, whole or not."""
    return path.is_dir() and any((path / name).exists() for name in (PREPARED_INDEX, PLAN))


def tokenizer_identity(tokenizer: Tokenizer, spec: str) -> dict[str, Any]:
    """What a folder keeps of the tokenizer that it was prepared with."""
    chat = "" if tokenizer.chat is None else tokenizer.chat.source
    return {
        "name": spec,
        "sha256": tokenizer.hash,
        "eos_id": tokenizer.eos_id,
        "chat_template": hashlib.sha256(chat.encode()).hexdigest(),
    }


def open_prepared(folder: Path, tokenizer: Tokenizer, config: DataConfig) -> Prepared:
    """Maps the shards of a folder. The sizes of all files are checked; their hashes are not
    (`verify_prepared`).

    Raises:
      UserError: it is half prepared or damaged, or prepared with other settings.
    """
    index = read_index(folder)
    known, given = index["tokenizer"], tokenizer_identity(tokenizer, config.tokenizer)
    same = ["sha256", "eos_id", *(["chat_template"] if index["conversations"] else [])]
    if any(known[key] != given[key] for key in same):
        raise UserError(
            f"data.source={config.source!r} was prepared with another tokenizer "
            f"({known['name']}) than data.tokenizer={config.tokenizer!r}: give that one, or "
            f"prepare the text again."
        )
    if index["conversations"] and index["loss_on"] != config.loss_on:
        raise UserError(
            f"data.loss_on={config.loss_on} but data.source={config.source!r} was prepared with "
            f"{index['loss_on']}: set that, or prepare the text again."
        )
    _check_sizes(folder, index)
    stream = map_shards(folder, index["shards"])
    return Prepared(stream, index["corpus_hash"], index, read_split(folder, index["split"]))


def map_shards(folder: Path, shards: list[dict[str, Any]]) -> Stream:
    """The stream of a folder's shards, each mapped when it is asked for."""
    return Stream(
        bases=np.cumsum([0, *(shard["tokens"] for shard in shards)], dtype=np.int64),
        shard=functools.lru_cache(_OPEN)(lambda number: _map_shard(folder, shards[number])),
        largest_id=max(shard["largest_id"] for shard in shards),
        total=sum(shard["total"] for shard in shards),
    )


def read_index(folder: Path) -> dict[str, Any]:
    """What prepared.json says. Raises UserError where it is not there or damaged."""
    path = folder / PREPARED_INDEX
    if not path.exists():
        raise UserError(
            f"{folder} is half prepared: run the same moe-jax data prepare once more, which goes "
            f"on where it stopped."
        )
    try:
        whole = json.loads(path.read_bytes())
        index, stated = whole["index"], whole["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {_AGAIN}.") from error
    if stated != _hash_of(index):
        raise UserError(f"{path} is damaged (its hash is another): {_AGAIN}.")
    if index["format"] != FORMAT:
        raise UserError(
            f"{folder} was prepared by another version of moe-jax ({index['version']}): {_AGAIN}."
        )
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Writes prepared.json, by which a folder is whole."""
    text = json.dumps({"sha256": _hash_of(index), "index": index}, indent=1)
    replace_text(folder / PREPARED_INDEX, text + "\n", durable=True)


def verify_prepared(folder: Path) -> Iterator[int]:
    """Compares every file with its hash; gives the bytes read since the last one.

    Raises:
      UserError: a file is missing or damaged.
    """
    index = read_index(folder)
    _check_sizes(folder, index)
    for name, stated in _files(index):
        if _hash_file(folder / name) != stated["sha256"]:
            raise UserError(f"{folder / name} is damaged (its hash is another): {_AGAIN}.")
        yield stated["bytes"]


def write_array(path: Path, values: np.ndarray) -> dict[str, Any]:
    """Writes a .npy file; returns its size and its hash, for the index."""
    values = np.ascontiguousarray(values)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    digest = hashlib.sha256()
    size = 0
    try:
        with path.open("wb") as file:
            # Not ndarray.tofile, whose error does not say that the disk is full.
            for part in (header.getvalue(), values.data.cast("B") if values.size else b""):
                file.write(part)
                digest.update(part)
                size += len(part)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_shard(folder: Path, number: int, shard: Shard) -> dict[str, dict[str, Any]]:
    """Writes the arrays of a shard; returns its files for the index."""
    files = {f"{number:05}.{name}.npy": values for name, values in shard._asdict().items()}
    return {
        name: write_array(folder / name, values)
        for name, values in files.items()
        if values is not None
    }


def write_split(folder: Path, split: Split) -> dict[str, Any]:
    """Writes the tables of a split; returns what the index says of it."""
    return {
        name: {
            "size": part.size,
            "counts": part.counts,
            "files": {f"split.{name}.npy": write_array(folder / f"split.{name}.npy", part.table)},
        }
        for name, part in split._asdict().items()
    }


def read_split(folder: Path, stated: dict[str, Any]) -> Split:
    """Maps what `write_split` wrote."""
    return Split(
        *(
            Extents(
                np.asarray(_map(folder / f"split.{name}.npy")),
                stated[name]["size"],
                stated[name]["counts"],
            )
            for name in Split._fields
        )
    )


def _map_shard(folder: Path, stated: dict[str, Any]) -> Shard:
    arrays = {}
    for file in stated["files"]:
        values, name = _map(folder / file), file.split(".")[1]
        if name in ("tokens", "counted"):
            # Windows are anywhere: reading ahead of one would read 100 times as much as it has.
            values.base.madvise(mmap.MADV_RANDOM)
        arrays[name] = np.asarray(values)  # faster to slice than a memmap
    return Shard(arrays["tokens"], arrays["starts"], arrays["keys"], arrays.get("counted"))


def _map(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:  # no header of numpy's
        raise UserError(f"{path} is damaged ({error}): {_AGAIN}.") from error


def _files(index: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    parts = [*index["shards"], *(index["split"][name] for name in Split._fields)]
    return [item for part in parts for item in part["files"].items()]


def _check_sizes(folder: Path, index: dict[str, Any]) -> None:
    """Raises UserError where a file is not there or not as long as it was."""
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    for name, stated in _files(index):
        if sizes.get(name) != stated["bytes"]:
            what = (
                f"has {sizes[name]:,} bytes instead of {stated['bytes']:,}"
                if name in sizes
                else "is missing"
            )
            raise UserError(f"{folder / name} {what}: copy it again, or {_AGAIN}.")


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
