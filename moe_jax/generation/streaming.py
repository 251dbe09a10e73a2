"""Text from tokens that come one by one: whole characters only, and nothing of a stop string.

stream = TextStream(tokenizer, stop=["\n\n"], after=prompt_ids)
for token in tokens:
    print(stream.push(token), end="")
    if stream.stopped:
        break
print(stream.finish())
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_jax.errors import UserError

if TYPE_CHECKING:
    from moe_jax.data.tokenizer import Tokenizer

EMPTY_PROMPT = "--prompt is empty: give at least one character to continue."
EMPTY_STOP = "--stop is empty: give the text to stop at, or leave it out."
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes tokens as they come. `stopped` turns true at the first stop string; push no token
    after that.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), after: Sequence[int] = ()):
        """
        Args:
          stop: Strings that end the text and are not part of it.
          after: The tokens that the text continues. Many tokenizers drop a space at the start of a
            text, so the space between the two would be lost without them.

        Raises:
          UserError: a stop string is empty.
        """
        if not all(stop):
            raise UserError(EMPTY_STOP)
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # Special tokens decode to nothing, so a stop string that is one of them is found by its id.
        self._stop_ids = {
            tokenizer.special_ids[string] for string in stop if string in tokenizer.special_ids
        }
        # Only the tokens of the last piece are decoded again, not the whole text: the time per
        # token stays the same.
        self._tokens, self._before = list(after), len(after)
        self._decoded = tokenizer.decode(self._tokens)
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain after one more token; often empty."""
        if token in self._stop_ids:
            rest = self.finish()
            self.stopped = True
            return rest
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        # A character may need several tokens: an unfinished one decodes to a replacement mark.
        if text.endswith(UNFINISHED) or len(text) <= len(self._decoded):
            return ""
        piece = text[len(self._decoded) :]
        self._tokens = self._tokens[self._before :]
        self._before = len(self._tokens)
        self._decoded = self._tokenizer.decode(self._tokens)
        return self._release(piece)

    def finish(self) -> str:
        """The text that was held back: an unfinished character, or the beginning of a stop string
        that did not go on.
        """
        if self.stopped:
            return ""
        rest = self._release(self._tokenizer.decode(self._tokens)[len(self._decoded) :])
        if self.stopped:
            return rest
        rest, self._held = rest + self._held, ""
        return rest

    def _release(self, piece: str) -> str:
        """The held text and `piece`, up to a stop string or to what may be the beginning of one."""
        text = self._held + piece
        matches = [
            (text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text
        ]
        if matches:
            self.stopped, self._held = True, ""
            # The one that was complete first, however the text was cut into tokens.
            _, start = min(matches)
            return text[:start]
        longest = max(
            (
                size
                for stop in self._stop
                for size in range(1, len(stop))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]
