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

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        after: Sequence[int] = (),
        marks: Sequence[str] = (),
    ):
        """
        Args:
          stop: Strings that end the text and are not part of it. They may hold special tokens,
            which the text does not: `"<|im_end|>\\n"`.
          after: The tokens that the text continues. Many tokenizers drop a space at the start of a
            text, so the space between the two would be lost without them.
          marks: Special tokens that the text holds.

        Raises:
          UserError: a stop string is empty.
        """
        if not all(stop):
            raise UserError(EMPTY_STOP)
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # Special tokens decode to nothing: those of marks and of stop strings are found by id.
        self._special = {
            number: name
            for name, number in tokenizer.special_ids.items()
            if name in marks or any(name in string for string in stop)
        }
        self._marks = frozenset(marks)
        # Only the tokens of the last piece are decoded again, not the whole text: the time per
        # token stays the same.
        self._tokens, self._before = list(after), len(after)
        self._decoded = tokenizer.decode(self._tokens)
        # Text that may be the beginning of a stop string, and which of its characters are shown.
        self._held = ""
        self._shown: list[bool] = []

    def push(self, token: int) -> str:
        """The text that is certain after one more token; often empty."""
        if token in self._special:
            return self._push_special(token)
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        # A character may need several tokens: an unfinished one decodes to a replacement mark.
        if text.endswith(UNFINISHED) or len(text) <= len(self._decoded):
            return ""
        piece = text[len(self._decoded) :]
        self._go_on_from(self._tokens[self._before :])
        return self._release(piece)

    def _push_special(self, token: int) -> str:
        """The text that is certain after a special token, with which no character goes on."""
        piece = self._tokenizer.decode(self._tokens)[len(self._decoded) :]
        self._go_on_from([*(self._tokens[self._before :] or self._tokens), token])
        shown = self._release(piece)
        if self.stopped:
            return shown
        name = self._special[token]
        return shown + self._release(name, shown=name in self._marks)

    def _go_on_from(self, tokens: list[int]) -> None:
        """Decodes what follows together with these tokens alone."""
        self._tokens, self._before = tokens, len(tokens)
        self._decoded = self._tokenizer.decode(tokens)

    def finish(self) -> str:
        """The text that was held back: an unfinished character, or the beginning of a stop string
        that did not go on.
        """
        if self.stopped:
            return ""
        rest = self._release(self._tokenizer.decode(self._tokens)[len(self._decoded) :])
        if self.stopped:
            return rest
        rest += self._visible(len(self._held))
        self._held, self._shown = "", []
        return rest

    def _release(self, piece: str, shown: bool = True) -> str:
        """The held text and `piece`, up to a stop string or to what may be the beginning of one."""
        text = self._held = self._held + piece
        self._shown += [shown] * len(piece)
        matches = [
            (text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text
        ]
        if matches:
            self.stopped = True
            # The one that was complete first, however the text was cut into tokens.
            _, start = min(matches)
            return self._visible(start)
        longest = max(
            (
                size
                for stop in self._stop
                for size in range(1, len(stop))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
        certain = len(text) - longest
        released = self._visible(certain)
        self._held, self._shown = text[certain:], self._shown[certain:]
        return released

    def _visible(self, length: int) -> str:
        """What is to be seen of the first characters of the held text."""
        held = zip(self._held[:length], self._shown, strict=False)
        return "".join(character for character, shown in held if shown)
