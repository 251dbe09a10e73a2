"""Which documents are held out for validation.

    split = hold_out(stream, fraction=0.05, seq_len=256)      # Split(train, validation)

Documents are split by content: all copies of a document go to the same side. They are taken in the
order of their hashes, each one (with its copies) that fits into what is still missing of the
fraction, which is at least one window. If more than half is still missing then, because there are
few and long documents (such as one book), the end of the longest is held out as a document of its
own.

Hashes and lengths are read from the shards, one shard at a time. Documents are put in order some
millions at a time, by the beginnings of their hashes; as a rule the first few per cent of them are
all that is looked at. Memory: that, and 3 bytes per document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moe_jax.data.packing import Extents, Shard, Stream, sizes_with_ends

# Documents that are put in order at a time.
_AT_ONCE = 1 << 21
_BUCKETS = 1 << 16  # by the first two bytes of a hash


class Split(NamedTuple):
    """The two parts of a stream."""

    train: Extents
    validation: Extents


class _Group(NamedTuple):
    """Documents in the order of their hashes."""

    sizes: np.ndarray  # tokens of each document with all its copies
    numbers: np.ndarray  # of all documents among all of the stream
    group: np.ndarray  # to which of `sizes` each of them belongs


def tokens_to_hold_out(total: int, fraction: float, seq_len: int) -> int:
    """How many tokens of `total`, which counts the ends of documents, are to be held out."""
    return max(int(fraction * total), seq_len + 1)


def hold_out(stream: Stream, fraction: float, seq_len: int) -> Split:
    """Splits a stream.

    Args:
      stream: all documents.
      fraction: fraction of the tokens to hold out.
      seq_len: tokens per sequence (S).
    """
    wanted = tokens_to_hold_out(stream.total, fraction, seq_len)
    documents = np.zeros(_BUCKETS, np.int64)
    smallest, total = math.inf, 0
    for shard in _shards(stream):
        documents += np.bincount(_bucket(shard), minlength=_BUCKETS)
        smallest = min(smallest, sizes_with_ends(shard).min(initial=1 << 62))
        total += len(shard.keys)
    held, missing = np.zeros(total, bool), wanted
    for group in _in_order(stream, documents):
        if missing < smallest:
            break
        taken, missing = _fitting(group.sizes, missing)
        held[group.numbers[taken[group.group]]] = True
    cut = np.empty(0, np.int64)
    if missing > wanted // 2 or wanted - missing <= seq_len:
        cut = _longest(stream, documents, held)
    return _extents(stream, held, cut, missing)


def _shards(stream: Stream) -> Iterator[Shard]:
    return (stream.shard(number) for number in range(len(stream.bases) - 1))


def _bucket(shard: Shard) -> np.ndarray:
    return np.asarray(shard.keys)[:, 0].astype(np.int64) << 8 | shard.keys[:, 1]


def _in_order(stream: Stream, documents: np.ndarray) -> Iterator[_Group]:
    """All documents in the order of their hashes, as many buckets at a time as have `_AT_ONCE` of
    them; `documents` is how many each bucket has.
    """
    before = np.cumsum(documents) - documents
    low = 0
    while low < _BUCKETS:
        high = int(np.searchsorted(before, before[low] + _AT_ONCE, side="right")) - 1
        high = _BUCKETS if before[-1] + documents[-1] - before[low] <= _AT_ONCE else high
        high = max(high, low + 1)
        keys, sizes, numbers, first = [], [], [], 0
        for shard in _shards(stream):
            bucket = _bucket(shard)
            chosen = np.flatnonzero((bucket >= low) & (bucket < high))
            keys.append(np.asarray(shard.keys)[chosen])
            sizes.append(sizes_with_ends(shard)[chosen])
            numbers.append(chosen + first)
            first += len(bucket)
        yield _grouped(*map(np.concatenate, (keys, sizes, numbers)))
        low = high


def _grouped(keys: np.ndarray, sizes: np.ndarray, numbers: np.ndarray) -> _Group:
    """Documents in the order of their keys, copies together."""
    if not len(keys):
        return _Group(sizes, numbers, numbers)
    begin = np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    order = np.argsort(begin, kind="stable")
    new = np.diff(begin[order], prepend=begin[order[:1]] + np.uint64(1)) != 0
    if (
        _differ(keys[order]) & ~new[1:]
    ).any():  # two documents whose hashes begin with the same 8 bytes
        whole = np.ascontiguousarray(keys).view("S32")[:, 0]
        order = np.argsort(whole, kind="stable")
        new = np.append(True, _differ(keys[order]))
    sums = np.add.reduceat(sizes[order], np.flatnonzero(new))
    return _Group(sums, numbers[order], np.cumsum(new) - 1)


def _differ(keys: np.ndarray) -> np.ndarray:
    """Whether each key but the first is another than the one before it."""
    words = keys.view(np.uint64)
    return (words[1:] != words[:-1]).any(axis=1)


def _fitting(sizes: np.ndarray, missing: int) -> tuple[np.ndarray, int]:
    """Which are taken, one after another, where each that fits into what is missing still is; and
    what is missing then.
    """
    taken = np.zeros(len(sizes), bool)
    left = np.arange(len(sizes))
    while len(left := left[sizes[left] <= missing]):
        sums = np.cumsum(sizes[left])
        fit = int(np.searchsorted(sums, missing, side="right"))
        taken[left[:fit]] = True
        missing -= int(sums[fit - 1])
        left = left[fit + 1 :]  # the one between does not fit, now or later
    return taken, missing


def _longest(stream: Stream, documents: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The numbers of the longest document that is not held, with its copies; of equal ones that
    with the largest hash.
    """
    longest, size = np.empty(0, np.int64), 0
    for group in _in_order(stream, documents):
        free = np.where(_group_held(group, held), 0, group.sizes)
        if len(free) and free.max() >= max(size, 1):
            size = int(free.max())
            chosen = len(free) - 1 - int(np.argmax(free[::-1]))
            longest = group.numbers[group.group == chosen]
    return np.sort(longest)


def _group_held(group: _Group, held: np.ndarray) -> np.ndarray:
    result = np.zeros(len(group.sizes), bool)
    result[group.group] = held[group.numbers]
    return result


class _Part:
    """Extents that are being found, from the beginning of the stream to its end."""

    def __init__(self) -> None:
        self.begins: list[np.ndarray] = [np.empty(0, np.int64)]
        self.places: list[np.ndarray] = [np.empty(0, np.int64)]
        self.size, self.end, self.counts = 0, -1, False

    def add(self, places: np.ndarray, sizes: np.ndarray, opens: np.ndarray) -> None:
        """More of it: places in the stream, tokens, whether each begins a document."""
        if not len(places):
            return
        ends = places + sizes
        new = ~opens | (places != np.append(self.end, ends[:-1]))
        begins = self.size + np.cumsum(sizes) - sizes
        self.begins.append(begins[new])
        self.places.append(np.where(opens, places, ~places)[new])
        self.size += int(sizes.sum())
        self.end = int(ends[-1])

    def extents(self) -> Extents:
        """All of it."""
        table = np.stack([np.concatenate(self.begins), np.concatenate(self.places)])
        return Extents(table, self.size, self.counts)


def _extents(stream: Stream, held: np.ndarray, cut: np.ndarray, missing: int) -> Split:
    """The parts, where the last `missing` tokens of the documents `cut` are held out too."""
    train, validation = _Part(), _Part()
    first = 0
    for shard, base in zip(_shards(stream), stream.bases[:-1].tolist(), strict=True):
        lengths = np.maximum(np.diff(shard.starts) - 1, 0)
        starts, sizes = shard.starts[:-1] + base, np.diff(shard.starts)
        own = held[first : first + len(lengths)]
        inner = np.searchsorted(cut, (first, first + len(lengths)))
        halved = np.zeros(len(lengths), bool)
        halved[cut[slice(*inner)] - first] = True
        whole = (sizes > 0) & ~halved
        halved &= sizes > 0
        at = np.maximum(lengths - missing, 0)[halved]
        begin, length = starts[halved], lengths[halved]
        some = at > 0  # else it is held out whole
        for part, chosen, pieces in (
            (
                train,
                whole & ~own,
                [
                    (begin[some], at[some], True),
                    ((begin + length)[some], np.ones_like(at[some]), False),
                ],
            ),
            (validation, whole & own, [(begin + at, length + 1 - at, True)]),
        ):
            pieces.append((starts[chosen], sizes[chosen], True))
            places, tokens, opens = (
                np.concatenate(each)
                for each in zip(
                    *((p, size, np.full(len(p), kind)) for p, size, kind in pieces), strict=True
                )
            )
            order = np.argsort(places, kind="stable")
            part.add(places[order], tokens[order], opens[order])
            part.counts |= _any_counts(shard, places - base, tokens, opens)
        first += len(lengths)
    return Split(train.extents(), validation.extents())


def _any_counts(shard: Shard, begins: np.ndarray, sizes: np.ndarray, opens: np.ndarray) -> bool:
    """Whether a token of these ranges counts. (The end of a document that is cut counts where the
    token in front of it does.)
    """
    if shard.counted is None:
        return len(begins) > 0
    before = np.concatenate([[0], np.cumsum(shard.counted, dtype=np.int64)])
    sums = before[begins + sizes] - before[begins]
    return bool(sums[opens].any())
