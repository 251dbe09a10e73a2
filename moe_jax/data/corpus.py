"""From text to batches: held-out documents, packed sequences, shuffled and sharded batches.

    corpus = load_corpus(config.data, seq_len=256, seed=0)
    batches = corpus.train_batches(global_batch=16)
    batch = next(batches)

Documents are concatenated, each followed by the end-of-document id, in one array of small integers.
Window w is tokens [w * S, w * S + S] of it: S inputs and their targets. It shares one token with
the next window, so every token except the first is a target in exactly one window.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moe_jax.config.schema import DataConfig
from moe_jax.data.packing import HostBatch, Packed, counted_tokens, pack_documents, token_dtype
from moe_jax.data.sources import ChatDocument, Document, read_documents
from moe_jax.data.tokenizer import Tokenizer, load_tokenizer
from moe_jax.errors import UserError

if TYPE_CHECKING:
    import grain


# Tokens of a held-out text that a sample begins with.
_SAMPLE_TOKENS = 24
# Characters tokenized at a time: bounds the memory of a tokenizer's intermediate results.
_CHUNK_CHARACTERS = 1 << 22


class SamplePrompt(NamedTuple):
    """What a sample of a trained model begins with."""

    text: str
    tokens: list[int]


@dataclass(frozen=True)
class Corpus:
    """Training and validation text, tokenized and packed."""

    tokenizer: Tokenizer
    hash: str
    """SHA-256 (hex) of the documents, in order, and of the tokenizer."""
    train: Packed
    validation: Packed
    seed: int

    @property
    def largest_id(self) -> int:
        """The largest token id in the text; a tokenizer may have larger ones."""
        return max(int(part.tokens.max()) for part in (self.train, self.validation))

    def sample_prompt(self) -> SamplePrompt:
        """A prompt like what was trained on: the first words of a held-out document, or of a
        conversation all that is before the assistant's reply.
        """
        held = self.validation
        size = int(held.starts[1]) - 1 if len(held.starts) > 1 else len(held.tokens) - 1
        counted = np.ones(size, bool) if held.counted is None else held.counted[:size]
        # Before the first reply there is something that does not count, as a rule.
        reply = 0 if counted.all() else int(np.argmax(counted))
        tokens = held.tokens[: reply or min(size, _SAMPLE_TOKENS)].tolist()
        return SamplePrompt(self.tokenizer.decode(tokens), tokens)

    def train_batches(
        self, global_batch: int, process_index: int = 0, process_count: int = 1
    ) -> grain.DatasetIterator[HostBatch]:
        """Endless batches: every epoch has all windows, in an order drawn from the seed.

        `get_state()` is a small JSON-able dict, the same in every process and for any number of
        processes; after `set_state` the next batch is the one that would have followed.

        Args:
          global_batch: rows of the batch of a step over all processes (B).
          process_index: p; its rows are [p * B / n, (p + 1) * B / n) of the global batch.
          process_count: n, which divides B.

        Raises:
          UserError: the text has fewer than B windows, or n does not divide B.
        """
        import grain

        rows = _process_rows(global_batch, process_index, process_count)
        if len(self.train) < global_batch:
            raise UserError(
                f"data.source has text for {len(self.train)} training sequences but "
                f"train.global_batch={global_batch}: "
                "give more text, or lower train.global_batch or train.seq_len."
            )
        # Only window numbers pass through grain, so a process can draw the whole batch and pack
        # only its own rows.
        windows = (
            grain.MapDataset.source(range(len(self.train)))
            .seed(self.seed)
            .shuffle()
            .repeat()
            .batch(global_batch, drop_remainder=True)
        )
        batches = windows.map(lambda numbers: self.train.batch(numbers[rows]))
        # No threads and no buffer: packing takes far less time than a step, and so the state is
        # that of the last batch handed out.
        return iter(
            batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        )

    def validation_batches(
        self, global_batch: int, count: int, process_index: int = 0, process_count: int = 1
    ) -> list[HostBatch]:
        """`count` batches of held-out text, the same at every call and for every seed; the
        arguments are those of `train_batches`.

        Raises:
          UserError: fewer than `count * global_batch` windows are held out, or n does not divide B.
        """
        rows = _process_rows(global_batch, process_index, process_count)
        if len(self.validation) < count * global_batch:
            raise UserError(
                f"data.validation_fraction holds out {len(self.validation)} sequences but a "
                f"validation needs "
                f"train.eval_batches x train.global_batch = {count * global_batch}: raise "
                f"data.validation_fraction, give more text, "
                "or lower train.eval_batches."
            )
        # RandomState and not default_rng: numpy promises that its stream never changes.
        order = np.random.RandomState(0).permutation(len(self.validation))
        return [
            self.validation.batch(order[i * global_batch : (i + 1) * global_batch][rows])
            for i in range(count)
        ]


def load_corpus(
    config: DataConfig, seq_len: int, seed: int, tell: Callable[[str], None] | None = None
) -> Corpus:
    """Reads, tokenizes, splits and packs the text that the configuration names.

    Args:
      config: source, tokenizer and fraction held out.
      seq_len: tokens per sequence (S).
      seed: for the order of the training windows.
      tell: called with a line before the reading, which may take long.

    Raises:
      UserError: a source or tokenizer is missing or cannot be read, or there is too little text.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    digest = hashlib.sha256()
    documents: list[np.ndarray] = []
    keys: list[bytes] = []
    source = read_documents(config)
    if tell is not None:
        tell(f"Reading data.source={config.source}.")
    for chunk in _chunks(source):
        for document, key in _encode(chunk, tokenizer, config):
            documents.append(document)
            keys.append(key)
    if not documents:
        raise UserError(
            f"data.source={config.source!r} is empty or blank: give a source with text in it."
        )
    for key in keys:
        digest.update(key)
    digest.update(tokenizer.fingerprint.encode("utf-8"))
    train, validation = (
        pack_documents(part, seq_len, tokenizer)
        for part in hold_out(documents, keys, config.validation_fraction, seq_len)
    )
    for packed in (train, validation):
        if len(packed.tokens) <= seq_len:
            tokens = len(train.tokens) + len(validation.tokens)
            raise UserError(
                f"data.source={config.source!r} holds {tokens} tokens, too few for a training and "
                f"a validation sequence of "
                f"train.seq_len={seq_len}: give more text or lower train.seq_len."
            )
        if packed.counted is not None and not packed.counted.any():
            raise UserError(
                f"data.source={config.source!r} has conversations in which the assistant says too "
                f"little to train and to validate on: give more, or set data.loss_on=all."
            )
    return Corpus(
        tokenizer=tokenizer, hash=digest.hexdigest(), train=train, validation=validation, seed=seed
    )


def hold_out(
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
            yield np.asarray(next(ids_of_texts), dtype), key
        else:
            ids, counts = _encode_chat(document, tokenizer, config)
            key = hashlib.sha256(np.asarray(ids, np.uint32).tobytes()).digest()
            yield counted_tokens(np.asarray(ids, dtype), np.asarray(counts, bool)), key


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


def _process_rows(global_batch: int, process_index: int, process_count: int) -> slice:
    """The rows of the global batch that belong to this process."""
    if global_batch % process_count:
        raise UserError(
            f"train.global_batch={global_batch} is not divisible by the {process_count} "
            f"processes: use a multiple of that."
        )
    size = global_batch // process_count
    return slice(process_index * size, (process_index + 1) * size)
