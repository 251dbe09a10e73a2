"""From text to batches: held-out documents, packed sequences, shuffled and sharded batches.

    corpus = load_corpus(config.data, seq_len=256, seed=0)
    batches = corpus.train_batches(global_batch=16)
    batch = next(batches)

Text is tokenized once: a prepared folder (prepared.py) is mapped, a small source is read into
memory, and any other is prepared into the cache the first time it is asked for. All give the same
batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moe_jax.config.schema import DataConfig
from moe_jax.data.encode import encode_piece
from moe_jax.data.hold_out import Split, hold_out
from moe_jax.data.mixture import Mixture
from moe_jax.data.packing import HostBatch, Packed, Stream, stream_in_memory
from moe_jax.data.prepare import cached, corpus_hash, no_text, split_for
from moe_jax.data.prepared import is_prepared, open_prepared
from moe_jax.data.sources import find_source
from moe_jax.data.tokenizer import Tokenizer, load_tokenizer
from moe_jax.errors import UserError
from moe_jax.utils.files import local_path

if TYPE_CHECKING:
    import grain


# Tokens of a held-out text that a sample begins with.
_SAMPLE_TOKENS = 24
# Tokens in which the beginning of the first reply of a conversation is looked for.
_LONGEST_QUESTION = 1 << 16
# Bytes of a source up to which it is tokenized at each start, which takes some tenths of a second:
# as bytes, and by another tokenizer.
SMALL_BYTES, SMALL_TEXT = 8 << 20, 1 << 20


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
    train: Mixture
    validation: Mixture
    seed: int

    @property
    def tokenizer_hash(self) -> str:
        """That of the tokenizer alone."""
        return self.tokenizer.hash

    @property
    def size_text(self) -> str:
        """How much text there is, in a sentence."""
        return f"{self.train.size:,} tokens to train on, {self.validation.size:,} held out."

    @property
    def largest_id(self) -> int:
        """The largest token id in the text; a tokenizer may have larger ones."""
        return max(part.stream.largest_id for part in self.train.parts)

    def sample_prompt(self) -> SamplePrompt:
        """A prompt like what was trained on: the first words of a held-out document, or of a
        conversation all that is before the assistant's reply.
        """
        held = self.validation.parts[0].first_document(_LONGEST_QUESTION)
        # Before the first reply there is something that does not count, as a rule.
        reply = 0 if held.counted.all() else int(np.argmax(held.counted))
        tokens = held.tokens[: reply or _SAMPLE_TOKENS].tolist()
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

        rows = process_rows(global_batch, process_index, process_count)
        if len(self.train) < global_batch:
            raise UserError(
                f"data.source has text for {len(self.train)} training sequences but "
                f"train.global_batch={global_batch}: "
                "give more text, or lower train.global_batch or train.seq_len."
            )
        # Only window numbers pass through grain, so a process can draw the whole batch and pack
        # only its own rows.
        windows = self.train.endless_order(self.seed).batch(global_batch, drop_remainder=True)
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
        rows = process_rows(global_batch, process_index, process_count)
        wanted = count * global_batch
        for number, (part, needed) in enumerate(self.validation.shares(wanted)):
            if len(part) < needed:
                of = f" of data.mixture[{number}]" if len(self.validation.parts) > 1 else ""
                raise UserError(
                    f"data.validation_fraction holds out {len(part)} sequences{of} but a "
                    f"validation needs {needed} (train.eval_batches x train.global_batch = "
                    f"{wanted}): raise data.validation_fraction, give more text, or lower "
                    f"train.eval_batches."
                )
        order = self.validation.fixed_order(wanted)
        return [
            self.validation.batch(order[i * global_batch : (i + 1) * global_batch][rows])
            for i in range(count)
        ]


class _Text(NamedTuple):
    """A source, tokenized and packed."""

    hash: str
    train: Packed
    validation: Packed


def load_corpus(
    config: DataConfig, seq_len: int, seed: int, tell: Callable[[str], None] | None = None
) -> Corpus:
    """The text that the configuration names, split and packed; tokenized where it is not yet.

    Args:
      config: source or mixture, tokenizer and fraction held out.
      seq_len: tokens per sequence (S).
      seed: for the order of the training windows.
      tell: called with a line before the reading, which may take long.

    Raises:
      UserError: a source or tokenizer is missing or cannot be read, or there is too little text.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    tell = tell or (lambda line: None)
    sources = [part.source for part in config.mixture] or [config.source]
    texts = []
    for number, source in enumerate(sources):
        name = f"data.mixture[{number}].source" if config.mixture else "data.source"
        own = dataclasses.replace(config, source=source, mixture=())
        try:
            texts.append(_load_text(own, tokenizer, seq_len, _naming(name, tell)))
        except UserError as error:
            raise UserError(str(error).replace("data.source", name)) from error
    weights = [part.weight for part in config.mixture] or [1]
    hashes = [text.hash for text in texts]
    mixed = hashlib.sha256(" ".join(["mixture", *hashes]).encode()).hexdigest()
    return Corpus(
        tokenizer=tokenizer,
        hash=mixed if config.mixture else hashes[0],
        train=Mixture([text.train for text in texts], weights),
        validation=Mixture([text.validation for text in texts], weights),
        seed=seed,
    )


def _naming(name: str, tell: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: tell(line.replace("data.source", name))


def _load_text(
    config: DataConfig, tokenizer: Tokenizer, seq_len: int, tell: Callable[[str], None]
) -> _Text:
    """What `data.source` names, split and packed."""
    text_hash, stream, split = _read(config, tokenizer, seq_len, tell)
    for part in split:
        if part.size <= seq_len:
            tokens = split.train.size + split.validation.size
            raise UserError(
                f"data.source={config.source!r} holds {tokens} tokens, too few for a training and "
                f"a validation sequence of "
                f"train.seq_len={seq_len}: give more text or lower train.seq_len."
            )
        if not part.counts:
            raise UserError(
                f"data.source={config.source!r} has conversations in which the assistant says too "
                f"little to train and to validate on: give more, or set data.loss_on=all."
            )
    return _Text(text_hash, *(Packed(stream, part, seq_len, tokenizer.eos_id) for part in split))


def _read(
    config: DataConfig, tokenizer: Tokenizer, seq_len: int, tell: Callable[[str], None]
) -> tuple[str, Stream, Split]:
    """The text and its hash by the way that fits its kind and size."""
    folder = None if config.source.startswith("hf:") else local_path(config.source)
    if folder is not None and is_prepared(folder):
        tell(f"Reading data.source={config.source}.")
    else:
        source = find_source(config)
        small = SMALL_BYTES if config.tokenizer == "bytes" else SMALL_TEXT
        folder = cached(config, tokenizer, source, tell) if source.size > small else None
        if folder is None:
            tell(f"Reading data.source={config.source}.")
            shards = [encode_piece(piece, tokenizer, config) for piece in source.pieces]
            stream = stream_in_memory(shards)
            text_hash = corpus_hash(stream, tokenizer)
            if not stream.total:
                raise no_text(config)
            return text_hash, stream, hold_out(stream, config.validation_fraction, seq_len)
    text = open_prepared(folder, tokenizer, config)
    return text.hash, text.stream, split_for(text, config.validation_fraction, seq_len)


def process_rows(global_batch: int, process_index: int, process_count: int) -> slice:
    """The rows of the global batch that belong to this process. Raises UserError where the
    processes cannot share it evenly.
    """
    if global_batch % process_count:
        raise UserError(
            f"train.global_batch={global_batch} is not divisible by the {process_count} "
            f"processes: use a multiple of that."
        )
    size = global_batch // process_count
    return slice(process_index * size, (process_index + 1) * size)
