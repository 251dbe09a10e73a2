"""A loaded model, and sequences that grow in its cache.

session = Session(loaded, batch=2)
logits_BV = session.feed([[1, 5, 9], [7, 2]])     # prompts; each row may have a length of its own
logits_BV = session.feed([[3], [8]])              # one token more: a decode step
session.rewind(0, 2)                              # row 0 forgets all but its first two tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.engine import Cache, Engine
from moe_jax.errors import UserError
from moe_jax.layers import Turn
from moe_jax.moe.layer import LayerTables
from moe_jax.tokenizer import Tokenizer

SHORTEST_TURN = 16  # tokens that a prompt is padded to at least
SHORTEST_CACHE = 128
FIRST_CHUNK, NEXT_CHUNK = 4096, 256  # tokens read at once: into an empty cache, and behind earlier tokens, whose scores are written out


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    engine: Engine
    params: Any
    tables: LayerTables
    tokenizer: Tokenizer
    context: int  # tokens that the model was made for
    eos_ids: tuple[int, ...]
    name: str


def bucket(length: int, shortest: int) -> int:
    """The least of `shortest` x 1, 2, 3, 4, 6, 8, 12, ... that is not less: few shapes to compile, at most half of one wasted."""
    size = shortest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 and size > shortest else size * 4 // 3 if size > shortest else size * 2
    return size


class Session:
    """Rows of tokens whose keys and values are kept."""

    def __init__(self, loaded: LoadedModel, batch: int = 1):
        self._loaded, self._engine = loaded, loaded.engine
        data = self._engine.mesh.shape["data"]
        self._rows = -(-batch // data) * data  # the mesh cuts rows evenly: those beyond `batch` are padding
        self._cache: Cache | None = None
        self._room = 0
        self.lengths = [0] * batch

    def feed(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Appends tokens (at least one) to each row; f32 logits [B, V] after the last of each.

        Raises UserError where a row would exceed the model's context; nothing has changed then.
        """
        counts = [len(row) for row in tokens]
        if len(counts) != len(self.lengths) or not all(counts):
            raise ValueError(f"feed takes {len(self.lengths)} rows of at least one token, not {counts}")
        longest = max(have + more for have, more in zip(self.lengths, counts, strict=True))
        if longest > self._loaded.context:
            raise UserError(
                f"{longest} tokens exceed the context of {self._loaded.context} tokens of {self._loaded.name}: shorten the text."
            )
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
        width = max(counts)
        width = 1 if width == 1 and not fresh else bucket(width, SHORTEST_TURN)
        cache = self._with_room(max(self.lengths) + width)
        tokens_BS = np.zeros((self._rows, width), np.int32)
        start_B, length_B = np.zeros((2, self._rows), np.int32)
        for row, part in enumerate(parts):
            tokens_BS[row, : len(part)] = part
            start_B[row], length_B[row] = self.lengths[row], len(part)
        turn = Turn(*map(jnp.asarray, (tokens_BS, start_B, length_B)))
        logits_BV, self._cache = self._engine.extend(self._loaded.params, self._loaded.tables, cache, turn, fresh=fresh)
        found = np.asarray(logits_BV)
        self.lengths = [have + more for have, more in zip(self.lengths, counts, strict=True)]
        return found

    def _with_room(self, length: int) -> Cache:
        """The cache, with places for `length` tokens of a row."""
        if self._cache is None or length > self._room:
            self._room = bucket(length, SHORTEST_CACHE)
            if self._cache is None:
                self._cache = self._engine.new_cache(self._rows, self._room)
            else:
                self._cache = self._engine.grow_cache(self._cache, self._room)
        return self._cache

    def rewind(self, row: int, length: int) -> None:
        """Forgets a row's tokens from number `length` on."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"row {row} has {self.lengths[row]} tokens and cannot be rewound to {length}")
        self.lengths[row] = length  # what lies beyond in the cache is overwritten before it is seen
