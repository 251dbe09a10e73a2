"""The text of one answer as its tokens come: whole characters, nothing of a stop string, and in a
chat reasoning, answer and calls of tools apart.

    reply = chat_reply(model, splitter, stop=["\\n\\n"], calls=TaggedCalls())
    for token in tokens:
        for piece in reply.push(token):
            send(piece.content, piece.reasoning, piece.call)
        if reply.stopped:
            break
    reply.finish()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from moe_jax.generation.reasoning import Channels, Part, Thoughts
from moe_jax.generation.streaming import TextStream
from moe_jax.serving.api.prompts import ServedModel
from moe_jax.serving.api.tool_calls import CallPiece, ChannelCalls, TaggedCalls

Calls = TaggedCalls | ChannelCalls


class Piece(NamedTuple):
    """A part of an answer, one of the three."""

    content: str = ""
    reasoning: str = ""
    call: CallPiece | None = None


class Reply:
    """One answer. `stopped` turns true where its text ends it; push no token after that."""

    def __init__(
        self,
        text: TextStream,
        splitter: Thoughts | Channels | None = None,
        calls: Calls | None = None,
        *,
        one_call: bool = False,
    ):
        """
        Args:
          splitter: tells reasoning from the answer; None in a plain completion.
          calls: finds calls of tools; None where none are offered.
          one_call: the answer ends after one call.
        """
        self.calls = calls
        self._text, self._splitter, self._one_call = text, splitter, one_call
        self._called = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string, or the one call that was allowed, has ended the answer."""
        return self._text.stopped or self._ended_by_call

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return self._called

    @property
    def _ended_by_call(self) -> bool:
        tagged = isinstance(self.calls, TaggedCalls)
        return self._one_call and tagged and self.calls is not None and self.calls.count > 0

    def push(self, token: int) -> list[Piece]:
        """What is certain after one more token."""
        return list(self._pieces(self._text.push(token)))

    def finish(self) -> list[Piece]:
        """What was held back."""
        if self._ended_by_call:
            return []
        pieces = list(self._pieces(self._text.finish()))
        if self._splitter is not None:
            pieces += self._of_parts(self._splitter.finish())
        if isinstance(self.calls, TaggedCalls):
            pieces += self._of_answer(self.calls.finish())
        return pieces

    def _pieces(self, text: str) -> Iterator[Piece]:
        if not text:
            return
        if self._splitter is None:
            yield Piece(text)
        else:
            yield from self._of_parts(self._splitter.push(text))

    def _of_parts(self, parts: Iterable[Part]) -> Iterator[Piece]:
        for part in parts:
            if isinstance(self.calls, ChannelCalls) and (call := self.calls.push(part)) is not None:
                self._called = True
                yield Piece(call=call)
            elif part.reasoning:
                yield Piece(reasoning=part.text)
            elif isinstance(self.calls, TaggedCalls):
                yield from self._of_answer(self.calls.push(part.text))
            else:
                yield Piece(part.text)

    def _of_answer(self, pieces: Iterable[str | CallPiece]) -> Iterator[Piece]:
        for piece in pieces:
            if self._ended_by_call and (isinstance(piece, str) or piece.id is not None):
                return
            if isinstance(piece, str):
                yield Piece(piece)
            else:
                self._called = True
                yield Piece(call=piece)


def completion_reply(model: ServedModel, prompt: Sequence[int], stop: Sequence[str]) -> Reply:
    """The continuation of a text."""
    return Reply(TextStream(model.tokenizer, stop, after=prompt))


def chat_reply(
    model: ServedModel,
    splitter: Thoughts | Channels,
    stop: Sequence[str],
    calls: Calls | None = None,
    *,
    one_call: bool = False,
) -> Reply:
    """The reply to a conversation that a chat template has written."""
    marks = (*splitter.marks, *(calls.marks if calls else ()))
    text = TextStream(model.tokenizer, stop, marks=marks)
    return Reply(text, splitter, calls, one_call=one_call)
