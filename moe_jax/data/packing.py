"""Documents packed into sequences of one length.

Not grain's `ConcatThenSplitIterDataset`: that packs a stream, so windows could be shuffled only
within a buffer, and batches and the saved position would be others. Here every window has a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moe_jax.data.tokenizer import Tokenizer

HostBatch = dict[str, np.ndarray]
"""`tokens`, `targets`, `positions`, `segments` int32 [B, S] and `mask` float32 [B, S], 1 where the
target counts.
"""


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type that holds the vocabulary."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class Packed:
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


def counted_tokens(ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A document some of whose tokens count as targets: records of `id` and `counts`, [length]."""
    document = np.empty(len(ids), [("id", ids.dtype), ("counts", bool)])
    document["id"], document["counts"] = ids, counts
    return document


def pack_documents(documents: Iterable[np.ndarray], seq_len: int, tokenizer: Tokenizer) -> Packed:
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
    return Packed(
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
