"""One running request: what it has been given, and when it ends."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_jax.generation.sampling import NOT_FINITE
from moe_jax.serving.request import Finished, Request, Token
from moe_jax.serving.row_sampling import MOST_TOP, draw_kind
from moe_jax.serving.stream import TokenStream


class Waiting(NamedTuple):
    """A request without a slot."""

    number: int  # requests are numbered as they come
    request: Request
    stream: TokenStream
    since: float
    drawn: list[int]  # tokens that it has been given, where it had a slot before


class TextRow:
    """A request in a slot. One that had a slot before draws the same tokens again, and hands them
    out only once.
    """

    def __init__(self, slot: int, waiting: Waiting, eos_ids: tuple[int, ...], num_ids: int):
        request = waiting.request
        self.slot, self.request, self.stream = slot, request, waiting.stream
        self.number = waiting.number
        self.waiting, self._drawn = waiting, waiting.drawn
        self.kind = draw_kind(request)
        self.length = 0
        """Tokens whose keys and values are in the cache."""
        self.tokens = 0
        """Tokens drawn."""
        self.newest = 0
        """The last of them."""
        self._ends = {*request.stop_token_ids, *(() if request.ignore_eos else eos_ids)}
        self._num_ids = num_ids
        self._failure: str | None = None

    @property
    def wants_top(self) -> bool:
        """Whether log-probabilities are asked for."""
        return self.request.logprobs is not None

    def allowed(self) -> np.ndarray | None:
        """Tokens that may come next, bool [num_ids]; None where all may."""
        mask = None
        if self.tokens < len(self._drawn):  # its filter has taken this token
            again = np.arange(self._num_ids) == self._drawn[self.tokens]
            return again if self.kind.adjusts else None
        if self.request.token_filter is not None:
            try:
                mask = np.array(self.request.token_filter.allowed(), bool)[: self._num_ids]
            except Exception as error:  # the request brought it: `take` ends this one alone
                self._failure = f"Its token filter failed: {error}"
        if self.tokens < self.request.min_tokens and self._ends:
            mask = np.ones(self._num_ids, bool) if mask is None else mask
            mask[[token for token in self._ends if 0 <= token < self._num_ids]] = False
        return mask

    def take(
        self, token: int, top: tuple[np.ndarray, ...] | None, context: int
    ) -> list[Token | Finished]:
        """A token was drawn: what to hand out, with `Finished` last where it is the end."""
        if self.tokens < len(self._drawn):
            self.newest = self._drawn[self.tokens]
            self.tokens += 1
            return []
        if token == NOT_FINITE:
            self._failure = self._failure or (
                "The model's logits are not finite, or its token filter allows no token."
            )
        if self._failure is None and token not in self._ends and self.request.token_filter:
            try:
                self.request.token_filter.accept(token)
            except Exception as error:
                self._failure = f"Its token filter failed: {error}"
        if self._failure is not None:
            return [Finished("error", self._failure)]
        if token in self._ends:
            return [Finished("stop")]
        self._drawn.append(token)
        self.tokens += 1
        self.newest = token
        # The last token needs no place: nothing is read after it.
        full = len(self.request.prompt) + self.tokens > context
        ended = full or self.tokens >= self.request.max_tokens
        return [self._described(token, top), *((Finished("length"),) if ended else ())]

    def _described(self, token: int, top: tuple[np.ndarray, ...] | None) -> Token:
        if self.request.logprobs is None or top is None:
            return Token(token)
        own_S, token_ST, log_ST = (array[self.slot] for array in top)
        count = min(self.request.logprobs, MOST_TOP)
        likeliest = zip(token_ST[:count].tolist(), log_ST[:count].tolist(), strict=True)
        return Token(token, float(own_S), tuple(likeliest))
