"""A folder of series, of any number and length, of which a part is read where it is needed.

    count = write_corpus(out, series, {"made by": "kernel"})     # series: any iterable of [T]
    corpus = open_corpus(out)
    corpus[7], corpus.part(7, 100, 612)

`values-00000.npy` has the series one after another in f32 (NaN where a value is missing),
`ends-00000.npy` where each ends, and so on per shard; `series.json` says what made them and how
many there are. The files are mapped into memory: opening a corpus of any size reads nothing, and a
window costs its own bytes. (Parquet and Arrow would be read by groups of rows of which training
needs a few values each, and npz cannot be mapped.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.utils.files import new_folder

_INDEX = "series.json"
_HASHED = 1 << 20  # values of a shard, at either end
SHARD_VALUES = 1 << 24  # of f32: 64 MiB, which is all that writing keeps


class SeriesCorpus:
    """Series by number. Holds arrays, or maps of files."""

    def __init__(self, values: Sequence[np.ndarray], ends: Sequence[np.ndarray]):
        self._values, self._ends = list(values), list(ends)
        self._firsts = np.cumsum([0, *map(len, self._ends)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, number: int) -> np.ndarray:
        """All of a series, f32 [T]."""
        return self.part(number, 0, None)

    def part(self, number: int, begin: int, end: int | None) -> np.ndarray:
        """Values [begin, end) of a series, f32; as for a list, `end` may be beyond its own."""
        shard = int(np.searchsorted(self._firsts, number, side="right")) - 1
        own, ends = number - int(self._firsts[shard]), self._ends[shard]
        first, last = int(ends[own - 1]) if own else 0, int(ends[own])
        stop = last if end is None else min(first + end, last)
        return np.asarray(self._values[shard][first + begin : stop])

    def lengths(self) -> np.ndarray:
        """Of each series, int64 [N]."""
        parts = [np.diff(ends, prepend=0) for ends in self._ends]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def fingerprint(self) -> str:
        """A hash (hex) of all lengths, and of the first and last values of each shard."""
        digest = hashlib.sha256()
        for values, ends in zip(self._values, self._ends, strict=True):
            for part in (ends, values[:_HASHED], values[-_HASHED:]):
                digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def observed(self, ahead: int) -> tuple[np.ndarray, np.ndarray]:
        """How many values each series has, and how many of those are not among its last `ahead`,
        int64 [N] each; one shard is read at a time.
        """
        whole, before = [], []
        for values, ends in zip(self._values, self._ends, strict=True):
            counts = np.concatenate([[0], np.cumsum(~np.isnan(values))])
            firsts = np.concatenate([[0], ends[:-1]])
            whole.append(counts[ends] - counts[firsts])
            before.append(counts[np.maximum(ends - ahead, firsts)] - counts[firsts])
        return np.concatenate(whole), np.concatenate(before)


def corpus_of(series: Iterable[np.ndarray]) -> SeriesCorpus:
    """Series in memory."""
    parts = [np.asarray(one, np.float32) for one in series]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return SeriesCorpus([np.concatenate(parts)], [ends]) if parts else SeriesCorpus([], [])


def write_corpus(out: Path, series: Iterable[np.ndarray], made_by: Mapping[str, Any]) -> int:
    """Writes series [T] as they come into the new folder `out`; returns their number.

    Memory is that of one shard. Nothing is left of a folder that fails. Raises UserError where
    `out` exists, and where there is no series.
    """
    with new_folder(out) as folder:
        count = shards = held = 0
        waiting: list[np.ndarray] = []

        def flush() -> None:
            nonlocal shards, held
            ends = np.cumsum([len(one) for one in waiting], dtype=np.int64)
            np.save(folder / f"values-{shards:05d}.npy", np.concatenate(waiting))
            np.save(folder / f"ends-{shards:05d}.npy", ends)
            waiting.clear()
            shards, held = shards + 1, 0

        for one in series:
            waiting.append(np.asarray(one, np.float32))
            count, held = count + 1, held + len(one)
            if held >= SHARD_VALUES:
                flush()
        if waiting:
            flush()
        if not count:
            raise UserError(f"{out}: there is no series to write.")
        index = {"series": count, "shards": shards, "made_by": dict(made_by)}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return count


def is_corpus(folder: Path) -> bool:
    """Whether a folder holds series."""
    return (folder / _INDEX).is_file()


def open_corpus(folder: Path) -> SeriesCorpus:
    """The series of a folder. Raises UserError where it is none, or not whole."""
    if not is_corpus(folder):
        raise UserError(
            f"{folder} is no corpus of series: make one with moe-jax synth, or with moe-jax data "
            f"series from a CSV file."
        )
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        names = [f"{number:05d}.npy" for number in range(index["shards"])]
        values = [np.load(folder / f"values-{name}", mmap_mode="r") for name in names]
        ends = [np.load(folder / f"ends-{name}", mmap_mode="r") for name in names]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} is not whole ({error}): make it again.") from error
    corpus = SeriesCorpus(values, ends)
    sizes = [(int(own[-1]), len(part)) for own, part in zip(ends, values, strict=True)]
    if len(corpus) != index.get("series") or any(own != part for own, part in sizes):
        raise UserError(f"{folder} is not whole: {_INDEX} says {index['series']:,} series.")
    return corpus
