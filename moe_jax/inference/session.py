"""A loaded model, and sequences that grow in its cache.

session = Session(loaded, batch=2)
logits_BV = session.feed([[1, 5, 9], [7, 2]])     # prompts; each row may have a length of its own
logits_BV = session.feed([[3], [8]])              # one token more: a decode step
session.rewind(0, 2)                              # row 0 forgets all but its first two tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.inference.engine import Cache, Engine
from moe_jax.models.batch import NewTokens
from moe_jax.moe.tables import LayerTables

if TYPE_CHECKING:
    from moe_jax.inference.offload import OffloadEngine

SHORTEST_TURN = 16  # tokens that new ones behind others are padded to at least
SHORTEST_CACHE = (
    1024  # places of a cache to begin with: only those in use are read, so room costs memory alone
)
STEP = 256  # the cache of a whole context is a multiple of it
FIRST_CHUNK, NEXT_CHUNK = (
    4096,
    256,
    # tokens read at once: into an empty cache, and behind earlier tokens, whose scores are written
    # out
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    engine: Engine | OffloadEngine
    params: Any
    tables: LayerTables
    tokenizer: Tokenizer
    context: int  # tokens that the model was made for
    eos_ids: tuple[int, ...]
    name: str

    def session(self, batch: int = 1) -> Session:
        """`batch` empty rows of text."""
        return Session(self, batch)


def bucket(length: int, shortest: int) -> int:
    """The least of `shortest` x 1, 2, 4, ... that is not less: few shapes to compile."""
    return shortest << max(0, (-(-length // shortest) - 1).bit_length())


def room(length: int, context: int) -> int:
    """Places of a cache for `length` tokens: 1,024, 2,048 and so on, but no more than the context,
    in whole steps.

    More than the context only where a short row's new tokens, padded behind the longest row, would
    not fit.
    """

    def steps(tokens):
        return -(-tokens // STEP) * STEP

    return max(min(bucket(length, SHORTEST_CACHE), steps(context)), steps(length))


def prompt_width(length: int) -> int:
    """The least of 16, 32, 48, 64, 96, 128, 192, ... that is not less: a prompt's padding is
    computed, so finer steps pay.
    """
    power = bucket(length, SHORTEST_TURN)
    return power * 3 // 4 if power > 2 * SHORTEST_TURN and length <= power * 3 // 4 else power


class Session:
    """Rows of tokens whose keys and values are kept."""

    def __init__(self, loaded: LoadedModel, batch: int = 1):
        self._loaded, self._engine = loaded, loaded.engine
        data = self._engine.mesh.shape["data"]
        self._rows = (
            -(-batch // data) * data
        )  # the mesh cuts rows evenly: those beyond `batch` are padding
        self._most = room(loaded.context, loaded.context)
        self._cache: Cache | None = None
        self._room = 0
        self.lengths = [0] * batch

    def feed(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Appends tokens (at least one) to each row; f32 logits [B, V] after the last of each.

        Raises UserError where a row would exceed the model's context, or has a token that the model
        does not; nothing has changed then.
        """
        counts = [len(row) for row in tokens]
        if len(counts) != len(self.lengths) or not all(counts):
            raise ValueError(
                f"feed takes {len(self.lengths)} rows of at least one token, not {counts}"
            )
        longest = max(have + more for have, more in zip(self.lengths, counts, strict=True))
        if longest > self._loaded.context:
            raise UserError(
                f"{longest} tokens exceed the context of {self._loaded.context} tokens of "
                f"{self._loaded.name}: shorten the text."
            )
        self._engine.check_tokens(max(max(row) for row in tokens))
        logits_BV = np.empty((len(counts), self._engine.vocab_size), np.float32)
        done = 0
        while done < max(counts):
            chunk = FIRST_CHUNK if not any(self.lengths) else 1 if max(counts) == 1 else NEXT_CHUNK
            parts = [row[done : done + chunk] for row in tokens]
            found = self._extend(parts)
            for row, part in enumerate(parts):
                if part and done + len(part) == counts[row]:
                    logits_BV[row] = found[row]
            done += chunk
        return logits_BV

    def _extend(self, parts: Sequence[Sequence[int]]) -> np.ndarray:
        counts, fresh = [len(part) for part in parts], not any(self.lengths)
        width, held = max(counts), max(self.lengths)
        if width > 1 or fresh:
            padded = prompt_width(width) if fresh else bucket(width, SHORTEST_TURN)
            width = max(width, min(padded, self._most - held))
        cache = self._with_room(held + width)
        tokens_BS = np.zeros((self._rows, width), np.int32)
        start_B, length_B = np.zeros((2, self._rows), np.int32)
        for row, part in enumerate(parts):
            tokens_BS[row, : len(part)] = part
            start_B[row], length_B[row] = self.lengths[row], len(part)
        turn = NewTokens(*map(jnp.asarray, (tokens_BS, start_B, length_B)))
        logits_BV, self._cache = self._engine.extend(
            self._loaded.params, self._loaded.tables, cache, turn, fresh=fresh
        )
        found = np.asarray(logits_BV)
        self.lengths = [have + more for have, more in zip(self.lengths, counts, strict=True)]
        return found

    def _with_room(self, length: int) -> Cache:
        """The cache, with places for `length` tokens of a row."""
        if self._cache is None or length > self._room:
            self._room = room(length, self._loaded.context)
            if self._cache is None:
                self._cache = self._engine.new_cache(self._rows, self._room)
            else:
                self._cache = self._engine.grow_cache(self._cache, self._room)
        return self._cache

    def rewind(self, row: int, length: int) -> None:
        """Forgets a row's tokens from number `length` on."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(
                f"row {row} has {self.lengths[row]} tokens and cannot be rewound to {length}"
            )
        self.lengths[row] = length  # what lies beyond in the cache is overwritten before it is seen
