"""Text held out and packed in memory, all at once and in plain Python: what the stored and mapped
text must give, bit for bit. It is how moe_jax itself did it first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_jax.data.packing import HostBatch, token_dtype
from moe_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class WholeText:
    """Concatenated documents, read in windows; `len` is the number of windows."""

    tokens: np.ndarray
    """[N], uint16 or uint32: every document followed by `eos_id`."""
    starts: np.ndarray
    """int64, ascending: where each document starts in `tokens`."""
    seq_len: int
    eos_id: int
    counted: np.ndarray | None = None
    """Bool [N]: whether the token counts as a target; None where all do."""

    def __len__(self) -> int:
        # The last token has no target, so it starts no window; the last window may contain padding.
        return max(0, -(-(len(self.tokens) - 1) // self.seq_len))

    def batch(self, windows: np.ndarray) -> HostBatch:
        """The batch whose rows are these windows.

        Within a row, segments number the documents from 1, and positions start at 0 in each (also
        if the document began in an earlier window: only distances matter). The mask is 0 where the
        target is the first token of another document, and where it does not count. Padding has
        segment 0, position 0, mask 0 and the token `eos_id`.
        """
        offset = windows.astype(np.int64)[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        real, place = offset < len(self.tokens), np.minimum(offset, len(self.tokens) - 1)
        token = np.where(real, self.tokens[place], self.eos_id).astype(np.int32)
        document = np.searchsorted(self.starts, offset, side="right") - 1
        position = offset - np.maximum(self.starts[document], offset[:, :1])
        segment = document - document[:, :1] + 1
        counts = real[:, 1:] & (document[:, 1:] == document[:, :-1])
        if self.counted is not None:
            counts &= self.counted[place[:, 1:]]
        return {
            "tokens": token[:, :-1],
            "targets": token[:, 1:],
            "positions": np.where(real, position, 0)[:, :-1].astype(np.int32),
            "segments": np.where(real, segment, 0)[:, :-1].astype(np.int32),
            "mask": counts.astype(np.float32),
        }


def held_out(
    documents: Sequence[np.ndarray], keys: Sequence[bytes], fraction: float, seq_len: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Splits documents into training and validation by content: all copies of a document go to the
    same side.

    Documents are taken in the order of their hashes, each one that fits into what is still missing
    of the fraction (at least one window). If more than half is still missing then, because there
    are few and long documents (such as one book), the end of the longest is held out as a document
    of its own.

    Args:
      documents: token ids, [length] each.
      keys: hash of the text of each document.
      fraction: fraction of the tokens to hold out.
      seq_len: tokens per sequence (S).
    """
    sizes: Counter[bytes] = Counter()
    for document, key in zip(documents, keys, strict=True):
        sizes[key] += len(document) + 1
    wanted = max(int(fraction * sizes.total()), seq_len + 1)
    held: set[bytes] = set()
    missing = wanted
    for key in sorted(sizes):
        if sizes[key] <= missing:
            held.add(key)
            missing -= sizes[key]
    enough = missing <= wanted // 2 and wanted - missing > seq_len
    cut = (
        None
        if enough
        else max(sizes.keys() - held, key=lambda key: (sizes[key], key), default=None)
    )
    train, validation = [], []
    for document, key in zip(documents, keys, strict=True):
        if key == cut:
            at = max(0, len(document) - missing)
            train.append(document[:at])
            validation.append(document[at:])
        else:
            (validation if key in held else train).append(document)
    return train, validation


def packed_whole(documents: Iterable[np.ndarray], seq_len: int, tokenizer: Tokenizer) -> WholeText:
    """Concatenates documents (integers, or those of `counted_tokens`, [length]) in the smallest
    type that holds the vocabulary; empty documents are left out.

    The end of a document counts if its last token does: a chat template that ends turns itself
    writes more behind the last one.
    """
    dtype = token_dtype(tokenizer)
    eos = np.array([tokenizer.eos_id], dtype)
    documents = [document for document in documents if len(document)]
    sizes = np.array([len(document) + 1 for document in documents], np.int64)
    parts = [
        part for document in documents for part in (_ids(document).astype(dtype, copy=False), eos)
    ]
    tokens = np.concatenate([np.empty(0, dtype), *parts])
    counted = None
    if any(document.dtype.names for document in documents):
        counts = [_counts(document) for document in documents]
        counted = np.concatenate([part for each in counts for part in (each, each[-1:])])
    return WholeText(
        tokens=tokens,
        starts=np.cumsum(sizes) - sizes,
        seq_len=seq_len,
        eos_id=tokenizer.eos_id,
        counted=counted,
    )


def _ids(document: np.ndarray) -> np.ndarray:
    return document["id"] if document.dtype.names else document


def _counts(document: np.ndarray) -> np.ndarray:
    return document["counts"] if document.dtype.names else np.ones(len(document), bool)
