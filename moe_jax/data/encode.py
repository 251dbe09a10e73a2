"""Documents to shards of tokens."""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from moe_jax.config.schema import DataConfig
from moe_jax.data.packing import Shard, counted_tokens, pack_documents, token_dtype
from moe_jax.data.sources import ChatDocument, Document, SourcePart, read_piece
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError

# Characters tokenized at a time: bounds the memory of a tokenizer's intermediate results.
_CHUNK_CHARACTERS = 1 << 20


def encode_piece(piece: list[SourcePart], tokenizer: Tokenizer, config: DataConfig) -> Shard:
    """The documents of a piece of `data.source`, without blank ones.

    Raises:
      UserError: a file cannot be read, or holds what the tokenizer does not take.
    """
    documents: list[np.ndarray] = []
    keys: list[bytes] = []
    for chunk in _chunks(read_piece(config, piece)):
        for document, key in _encode(chunk, tokenizer, config):
            documents.append(document)
            keys.append(key)
    return pack_documents(documents, keys, tokenizer)


def _encode(
    chunk: list[Document], tokenizer: Tokenizer, config: DataConfig
) -> Iterator[tuple[np.ndarray, bytes]]:
    """Each document as `pack_documents` takes it, and the hash of its content."""
    dtype = token_dtype(tokenizer)
    texts = [document for document in chunk if isinstance(document, str)]
    ids_of_texts = iter(tokenizer.encode_batch(texts) if texts else ())
    for document in chunk:
        if isinstance(document, str):
            key = hashlib.sha256(document.encode("utf-8")).digest()
            ids = next(ids_of_texts)
            # numpy takes three times as long for a list of numbers.
            whole = ids if isinstance(ids, np.ndarray) else np.asarray(array.array("I", ids))
            yield whole.astype(dtype), key
        else:
            said, counts = _encode_chat(document, tokenizer, config)
            key = hashlib.sha256(np.asarray(said, np.uint32).tobytes()).digest()
            yield counted_tokens(np.asarray(said, dtype), np.asarray(counts, bool)), key


def _encode_chat(
    document: ChatDocument, tokenizer: Tokenizer, config: DataConfig
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and whether each counts in the loss."""
    if tokenizer.chat is None:
        raise UserError(
            f"{document.where} is a conversation and data.tokenizer={config.tokenizer!r} has no "
            f"chat template: name a folder whose tokenizer has one."
        )
    try:
        if config.loss_on == "assistant":
            return tokenizer.chat.conversation(document.messages)
        ids = tokenizer.chat.whole(document.messages)
        return ids, [True] * len(ids)
    except UserError as error:
        raise UserError(f"{document.where}: {error}") from error


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents with about `_CHUNK_CHARACTERS` characters, without blank documents."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        text = document if isinstance(document, str) else str(document.messages)
        if not text.strip():
            continue
        chunk.append(document)
        size += len(text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
