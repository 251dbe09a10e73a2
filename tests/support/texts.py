"""Text that is packed without a source, and what a packed text holds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from moe_jax.data.packing import Extents, Packed, Shard, pack_documents, stream_in_memory
from moe_jax.data.tokenizer import Tokenizer


def keys_of(documents: Sequence[np.ndarray]) -> list[bytes]:
    """A hash of each document."""
    return [hashlib.sha256(np.asarray(document).tobytes()).digest() for document in documents]


def packed(documents: Sequence[np.ndarray], seq_len: int, tokenizer: Tokenizer) -> Packed:
    """All of the documents in one part."""
    shard = pack_documents(documents, keys_of(documents), tokenizer)
    return everything([shard], seq_len, tokenizer)


def everything(shards: list[Shard], seq_len: int, tokenizer: Tokenizer) -> Packed:
    """All of the shards in one part."""
    stream = stream_in_memory(shards)
    extents = Extents(np.zeros((2, 1), np.int64), int(stream.bases[-1]), True)
    return Packed(stream, extents, seq_len, tokenizer.eos_id)


def tokens_of(text: Packed) -> np.ndarray:
    """All tokens."""
    return text.read(0, text.size).tokens


def counted_of(text: Packed) -> np.ndarray:
    """Which of them count as targets."""
    return text.read(0, text.size).counted


def documents_of(text: Packed) -> list[np.ndarray]:
    """All documents, with their ends."""
    whole = text.read(0, text.size)
    return np.split(whole.tokens, np.flatnonzero(whole.first)[1:])
