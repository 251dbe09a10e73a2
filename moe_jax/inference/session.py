"""A loaded model, and sequences that grow in its cache.

    session = loaded.session(batch=2)
    logits_BV = session.feed([[1, 5, 9], [7, 2]])     # prompts; each row may have its own length
    logits_BV = session.feed([[3], [8]])              # one more token each: a decoding step
    session.rewind(0, 2)                              # row 0 forgets all but its first two tokens

Logits stay on the devices: a program behind the step may choose the next tokens there
(generation/sampling.py), and only those come to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.inference.engine import Engine
from moe_jax.inference.kv_cache import KVCache, bucket
from moe_jax.models.batch import NewTokens

SHORTEST_PROMPT = 16  # tokens that several new ones are padded to at least
# Tokens read at once: into empty rows, and behind earlier tokens, whose scores are written out.
FIRST_CHUNK, NEXT_CHUNK = 4096, 256


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    engine: Engine
    tokenizer: Tokenizer
    context: int  # tokens that the model was made for
    eos_ids: tuple[int, ...]
    name: str

    @property
    def held_in(self) -> str:
        """The types of its weights, such as `int4 and bfloat16`."""
        return self.engine.plan.held_in

    def session(self, batch: int = 1) -> Session:
        """`batch` empty rows of text."""
        return Session(self, batch)


def prompt_width(length: int) -> int:
    """The least of 16, 32, 48, 64, 96, 128, 192, ... that is not less: a prompt's padding is
    computed, so finer steps pay.
    """
    power = bucket(length, SHORTEST_PROMPT)
    return power * 3 // 4 if power > 2 * SHORTEST_PROMPT and length <= power * 3 // 4 else power


class Session:
    """Rows of text that grow together."""

    def __init__(self, loaded: LoadedModel, batch: int = 1):
        self._loaded, self._engine = loaded, loaded.engine
        self._cache = KVCache(loaded.engine.layout, batch, loaded.context)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self._cache.lengths

    def feed(self, tokens: Sequence[Sequence[int]]) -> jax.Array:
        """Appends tokens (at least one) to each row; f32 logits [B, V] after the last of each, on
        the devices.

        Raises UserError where a row would exceed the model's context, or has a token that the model
        does not; nothing has changed then.
        """
        counts = [len(row) for row in tokens]
        self._check(tokens, counts)
        logits_BV: jax.Array | None = None
        done = 0
        while done < max(counts):
            chunk = FIRST_CHUNK if not any(self.lengths) else 1 if max(counts) == 1 else NEXT_CHUNK
            parts = [row[done : done + chunk] for row in tokens]
            chunk_logits_BV = self._read(parts)
            if logits_BV is None:
                logits_BV = chunk_logits_BV
            else:
                goes_on_B = np.array([count > done for count in counts])
                logits_BV = jnp.where(goes_on_B[:, None], chunk_logits_BV, logits_BV)
            done += chunk
        assert logits_BV is not None
        return logits_BV

    def logits(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """As `feed`, with the logits on the host."""
        return np.asarray(self.feed(tokens))

    def rewind(self, row: int, length: int) -> None:
        """Forgets a row's tokens from number `length` on."""
        self._cache.rewind(row, length)

    def _check(self, tokens: Sequence[Sequence[int]], counts: list[int]) -> None:
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
        self._engine.plan.check_tokens(max(max(row) for row in tokens))

    def _read(self, parts: Sequence[Sequence[int]]) -> jax.Array:
        """Reads the next tokens of each row, of some rows none; logits [B, V] after them."""
        cache, counts = self._cache, [len(part) for part in parts]
        first, width = cache.longest == 0, max(counts)
        if width > 1 or first:
            padded = prompt_width(width) if first else bucket(width, SHORTEST_PROMPT)
            width = max(width, min(padded, cache.most - cache.longest))
        tokens_BS = np.zeros((cache.rows, width), np.int32)
        start_B, length_B = np.zeros((2, cache.rows), np.int32)
        for row, part in enumerate(parts):
            tokens_BS[row, : len(part)] = part
            start_B[row], length_B[row] = cache.lengths[row], len(part)
        new = NewTokens(jnp.asarray(tokens_BS), jnp.asarray(start_B), jnp.asarray(length_B))
        run = self._engine.prefill if first else self._engine.decode
        logits_BV, arrays = run(cache.reserve(cache.longest + width), new)
        cache.commit(arrays, counts)
        return logits_BV if cache.rows == len(counts) else logits_BV[: len(counts)]
