"""Documents packed into sequences of one length.

All documents of a source, in order, each followed by the end-of-document id, are one `Stream`: it
is stored in shards, in memory or in memory-mapped files. Training and validation text are views of
it (`Extents`), so that neither is ever copied, and any fraction can be held out of stored text.

Not grain's `ConcatThenSplitIterDataset`: that packs a stream, so windows could be shuffled only
within a buffer, and batches and the saved position would be others. Here every window has a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from moe_jax.data.tokenizer import Tokenizer

HostBatch = dict[str, np.ndarray]
"""`tokens`, `targets`, `positions`, `segments` int32 [B, S] and `mask` float32 [B, S], 1 where the
target counts.
"""


class Batches(Protocol):
    """Training batches without end, with a position that a checkpoint keeps."""

    def __next__(self) -> HostBatch:
        """The next batch."""

    def get_state(self) -> dict[str, Any]:
        """The position."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type that holds the vocabulary."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


class Shard(NamedTuple):
    """Consecutive documents."""

    tokens: np.ndarray
    """[n], uint16 or uint32: every document followed by `eos_id`; nothing of an empty one."""
    starts: np.ndarray
    """int64 [d + 1]: where each document starts in `tokens`, and n."""
    keys: np.ndarray
    """uint8 [d, 32]: SHA-256 of each document's content."""
    counted: np.ndarray | None
    """Bool [n]: whether the token counts as a target; None where all do. The end of a document
    counts if its last token does: a chat template that ends turns itself writes more behind the
    last one.
    """


def pack_documents(
    documents: Iterable[np.ndarray], keys: Iterable[bytes], tokenizer: Tokenizer
) -> Shard:
    """A shard of documents (integers, or those of `counted_tokens`, [length]) in the smallest type
    that holds the vocabulary.
    """
    dtype = token_dtype(tokenizer)
    documents = list(documents)
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    starts = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(lengths + (lengths > 0), out=starts[1:])
    tokens = np.full(starts[-1], tokenizer.eos_id, dtype)
    counted = np.ones(len(tokens), bool) if any(each.dtype.names for each in documents) else None
    for start, document in zip(starts.tolist(), documents, strict=False):
        end = start + len(document)
        tokens[start:end] = document["id"] if document.dtype.names else document
        if counted is not None and document.dtype.names and len(document):
            counted[start:end] = document["counts"]
            counted[end] = document["counts"][-1]
    flat = np.frombuffer(b"".join(keys), np.uint8).reshape(len(documents), 32)
    return Shard(tokens, starts, flat, counted)


def counted_tokens(ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A document some of whose tokens count as targets: records of `id` and `counts`, [length]."""
    document = np.empty(len(ids), [("id", ids.dtype), ("counts", bool)])
    document["id"], document["counts"] = ids, counts
    return document


@dataclass(frozen=True)
class Stream:
    """All documents of a source, in order."""

    bases: np.ndarray
    """int64 [shards + 1]: where in the stream each shard begins, and the stream ends."""
    shard: Callable[[int], Shard]
    """A shard by its number."""
    largest_id: int
    total: int
    """Tokens of all documents, an end for each: of empty ones too, for which none is stored."""

    def within(self, begin: int, end: int) -> Iterator[tuple[Shard, slice]]:
        """The shards of tokens [begin, end), and which of each one's tokens these are."""
        number = int(np.searchsorted(self.bases, begin, side="right")) - 1
        while begin < end:
            base, next_base = self.bases[number : number + 2].tolist()
            stop = min(end, next_base)
            if begin < stop:
                yield self.shard(number), slice(begin - base, stop - base)
            begin, number = stop, number + 1


def sizes_with_ends(shard: Shard) -> np.ndarray:
    """Tokens of each document and its end, which an empty one has here too."""
    return np.maximum(np.diff(shard.starts), 1)


def largest_token(shard: Shard) -> int:
    """The largest id; 0 where there is none."""
    return int(shard.tokens.max(initial=0))


def stream_in_memory(shards: list[Shard]) -> Stream:
    """The stream of such shards."""
    return Stream(
        bases=np.cumsum([0, *(len(shard.tokens) for shard in shards)], dtype=np.int64),
        shard=shards.__getitem__,
        largest_id=max(map(largest_token, shards), default=0),
        total=sum(int(sizes_with_ends(shard).sum()) for shard in shards),
    )


@dataclass(frozen=True)
class Extents:
    """A part of a stream: which of its tokens, in order."""

    table: np.ndarray
    """int64 [2, E], memory-mapped where it is stored: where each extent begins in the part,
    ascending, and where in the stream. Of one that begins no document of the part the latter is
    ~place: it is the end of a document whose middle is not in the part.
    """
    size: int
    """Tokens."""
    counts: bool
    """Whether any token counts as a target."""


class _Text(NamedTuple):
    """Consecutive tokens of a part."""

    tokens: np.ndarray
    first: np.ndarray
    """Whether each is the first of its document."""
    counted: np.ndarray


@dataclass(frozen=True)
class Packed:
    """A part of a stream, read in windows; `len` is the number of windows.

    Window w is tokens [w * S, w * S + S] of it: S inputs and their targets. It shares one token
    with the next window, so every token except the first is a target in exactly one window.
    """

    stream: Stream
    extents: Extents
    seq_len: int
    eos_id: int

    @property
    def size(self) -> int:
        """Tokens."""
        return self.extents.size

    def __len__(self) -> int:
        # The last token has no target, so it starts no window; the last window may contain padding.
        return max(0, -(-(self.size - 1) // self.seq_len))

    def batch(self, windows: np.ndarray) -> HostBatch:
        """The batch whose rows are these windows.

        Within a row, segments number the documents from 1, and positions start at 0 in each (also
        if the document began in an earlier window: only distances matter). The mask is 0 where the
        target is the first token of another document, and where it does not count. Padding has
        segment 0, position 0, mask 0 and the token `eos_id`.
        """
        shape = (len(windows), self.seq_len + 1)
        token = np.full(shape, self.eos_id, np.int32)
        segment, position, counts = (np.zeros(shape, kind) for kind in (np.int32, np.int32, bool))
        places = np.arange(shape[1], dtype=np.int32)
        for row, window in enumerate(windows.tolist()):
            begin = window * self.seq_len
            text = self.read(begin, min(begin + shape[1], self.size))
            real = len(text.tokens)
            first = text.first
            first[:1] = True
            token[row, :real] = text.tokens
            segment[row, :real] = np.cumsum(first)
            start = np.maximum.accumulate(np.where(first, places[:real], 0))
            position[row, :real] = places[:real] - start
            counts[row, :real] = text.counted & ~first
        return {
            "tokens": token[:, :-1],
            "targets": token[:, 1:],
            "positions": position[:, :-1],
            "segments": segment[:, :-1],
            "mask": counts[:, 1:].astype(np.float32),
        }

    def read(self, begin: int, end: int) -> _Text:
        """Tokens [begin, end) of the part."""
        begins, places = np.asarray(self.extents.table)
        number = int(np.searchsorted(begins, begin, side="right")) - 1
        parts: list[_Text] = []
        while begin < end:
            own, place = int(begins[number]), int(places[number])
            stop = min(end, int(begins[number + 1]) if number + 1 < len(begins) else self.size)
            opens = place >= 0
            place = begin - own + (place if opens else ~place)
            part = self._read_stream(place, place + stop - begin)
            if begin == own:
                part.first[0] = opens
                if not opens:  # it counts as the token in front of it, here and not in the stream
                    part.counted[0] = self.read(begin - 1, begin).counted[0]
            parts.append(part)
            begin, number = stop, number + 1
        return _joined(parts)

    def first_document(self, most: int) -> _Text:
        """The first document without its end, or as many tokens of it."""
        text = self.read(0, min(most + 1, self.size))
        text.first[:1] = False
        ends = int(np.argmax(text.first)) if text.first.any() else len(text.tokens)
        cut = ends - 1 if ends < len(text.tokens) or len(text.tokens) == self.size else most
        return _Text(*(values[:cut] for values in text))

    def _read_stream(self, begin: int, end: int) -> _Text:
        parts = []
        for shard, own in self.stream.within(begin, end):
            first = np.zeros(own.stop - own.start, bool)
            inside = np.searchsorted(shard.starts, (own.start, own.stop))
            first[shard.starts[slice(*inside)] - own.start] = True
            counted = np.ones(len(first), bool)
            if shard.counted is not None:
                counted = np.array(shard.counted[own])
            parts.append(_Text(shard.tokens[own], first, counted))
        return _joined(parts)


def _joined(parts: list[_Text]) -> _Text:
    if len(parts) == 1:
        return parts[0]
    return _Text(*(np.concatenate(each) for each in zip(*parts, strict=True)))
