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

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes tokens as they come; `stopped` turns true at the first stop string, after which
    nothing is to be pushed.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), after: Sequence[int] = ()):
        """
        Args:
          stop: Strings that end the text and are not part of it.
          after: Tokens that the text goes on from, where the space between both matters: many
            tokenizers drop a space
            that nothing comes before.

        Raises:
          UserError: a stop string is empty.
        """
        if not all(stop):
            raise UserError("--stop is empty: give the text to stop at, or leave it out.")
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # Special tokens decode to nothing, so a stop string that is one of them is told by its id.
        self._stop_ids = {
            tokenizer.special_ids[string] for string in stop if string in tokenizer.special_ids
        }
        # Decoding begins at the tokens of the last piece and not at the text's beginning: time a
        # token stays the same.
        self._tokens, self._before = list(after), len(after)
        self._decoded = tokenizer.decode(self._tokens)
        self._held = ""

    def push(self, token: int) -> str:
        """The text that one more token makes certain; often empty."""
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
        """What was held back and is now known not to go on: an unfinished character, the beginning
        of a stop string.
        """
        if self.stopped:
            return ""
        rest = self._release(self._tokenizer.decode(self._tokens)[len(self._decoded) :])
        if self.stopped:
            return rest
        rest, self._held = rest + self._held, ""
        return rest

    def _release(self, piece: str) -> str:
        """Of the held text and `piece`, what stands before a stop string and cannot be the
        beginning of one.
        """
        text = self._held + piece
        found = [
            (text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text
        ]
        if found:
            self.stopped, self._held = True, ""
            return text[
                : min(found)[1]
            ]  # the one that was complete first, however the text was cut into tokens
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
