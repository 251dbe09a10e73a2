"""What a model thinks, apart from what it answers.

    splitter = reply_splitter(tokenizer, prompt_ids)
    for piece in pieces:                        # of a TextStream with `marks=splitter.marks`
        for part in splitter.push(piece):
            show(part.text, dim=part.reasoning)

Two forms are known. Most models write `<think>...</think>` before the answer, where the template
may have written the first of the two. gpt-oss writes messages with a channel each,
`<|channel|>analysis<|message|>...<|end|>`, and answers on the channel `final`. A message may be for
a tool, `<|channel|>commentary to=functions.weather<|message|>{...}<|call|>`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from moe_jax.data.chat_template import CHANNEL, THOUGHTS
from moe_jax.generation.streaming import TextStream

if TYPE_CHECKING:
    from moe_jax.data.tokenizer import Tokenizer

_START, MESSAGE_MARK, ANSWER_CHANNEL = "<|start|>", "<|message|>", "final"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", _START)
_TAIL = 32  # tokens of a prompt in which its template may have begun a thought


class Part(NamedTuple):
    """A piece of a reply."""

    text: str
    reasoning: bool
    call: tuple[int, str] | None = None
    """Of a message to a tool: its number in the reply and whom it is for, `functions.weather`."""


class Thoughts:
    """Splits a reply that may begin with a thought."""

    marks = tuple(mark for pair in THOUGHTS.items() for mark in pair)
    """Special tokens that the text must hold."""

    def __init__(self, end: str | None = None):
        """`end`: of the thought that the prompt has begun."""
        self.begun_end = end
        self._held, self._end, self._began = "", end, end is not None
        self._blank = False  # blanks between thought and answer, which belong to neither

    def push(self, piece: str) -> list[Part]:
        """The parts that are certain after one more piece of the reply."""
        self._held += piece
        return [part for part in self._split() if part.text]

    def finish(self) -> list[Part]:
        """What was held back, because it might have been the beginning of a mark."""
        return [Part(self._held, self._end is not None)] if self._held else []

    def _split(self) -> Iterator[Part]:
        if not self._began:
            said = self._held.lstrip()
            if any(mark.startswith(said) and mark != said for mark in THOUGHTS):
                return
            self._began = True
            if mark := next((mark for mark in THOUGHTS if said.startswith(mark)), ""):
                self._end, self._held = THOUGHTS[mark], said.removeprefix(mark)
        if self._end is not None:
            text, mark, self._held = split_at(self._held, [self._end])
            yield Part(text, True)
            if not mark:
                return
            self._end, self._blank = None, True
        if self._blank:
            self._held = self._held.lstrip()
            self._blank = not self._held
        text, self._held = self._held, ""
        yield Part(text, False)


class Channels:
    """Splits a reply of messages, each with a header that names its channel."""

    marks = (CHANNEL, MESSAGE_MARK, *_ENDS)
    """Special tokens that the text must hold."""

    def __init__(self) -> None:
        self._held, self._header = "", True
        self._messages, self._reasoning = 0, False
        self._call: tuple[int, str] | None = None

    def push(self, piece: str) -> list[Part]:
        """The parts that are certain after one more piece of the reply."""
        self._held += piece
        return [part for part in self._split() if part.text]

    def finish(self) -> list[Part]:
        """What was held back; a reply without any header is an answer."""
        seen = not (self._header and (self._messages or CHANNEL in self._held))
        reasoning = self._reasoning and not self._header
        return [Part(self._held, reasoning, self._call)] if seen and self._held else []

    def _split(self) -> Iterator[Part]:
        while True:
            if self._header:
                header, mark, rest = split_at(self._held, [MESSAGE_MARK])
                if not mark:
                    return
                channel = re.search(re.escape(CHANNEL) + r"\s*(\w+)", header)
                self._reasoning = channel is not None and channel[1] != ANSWER_CHANNEL
                self._held, self._header, self._messages = rest, False, self._messages + 1
                tool = re.search(r"\bto=([\w.-]+)", header)
                self._call = None if tool is None else (self._messages, tool[1])
            text, mark, self._held = split_at(self._held, _ENDS)
            yield Part(text, self._reasoning, self._call)
            if not mark:
                return
            self._header = True


def split_at(text: str, marks: Sequence[str]) -> tuple[str, str, str]:
    """(text before the first mark, the mark, the rest). Without a mark: (text, "", what may be the
    beginning of one).
    """
    found = [(text.find(mark), mark) for mark in marks if mark in text]
    if found:
        at, mark = min(found)
        return text[:at], mark, text[at + len(mark) :]
    held = max(size for mark in marks for size in range(len(mark)) if text.endswith(mark[:size]))
    return text[: len(text) - held], "", text[len(text) - held :]


def reply_splitter(tokenizer: Tokenizer, prompt: Sequence[int]) -> Thoughts | Channels:
    """What splits the reply to a prompt that a chat template has written."""
    stream = TextStream(tokenizer, marks=(*Channels.marks, *Thoughts.marks))
    tail = "".join([*(stream.push(token) for token in prompt[-_TAIL:]), stream.finish()])
    names = tokenizer.chat.tokens if tokenizer.chat else {}
    if CHANNEL in names and MESSAGE_MARK in names and re.search(rf"{re.escape(_START)}\w+$", tail):
        return Channels()
    begun = next((mark for mark in THOUGHTS if tail.rstrip().endswith(mark)), None)
    return Thoughts(None if begun is None else THOUGHTS[begun])


def answer_pieces(
    pieces: Iterable[str], splitter: Thoughts | Channels, reasoning: Callable[[str], None]
) -> Generator[str, None, None]:
    """Pieces of the answer in a reply, one per piece and sometimes empty; `reasoning` is called
    with the rest of the reply as it comes.
    """

    def answer(parts: list[Part]) -> str:
        for part in parts:
            if part.reasoning:
                reasoning(part.text)
        return "".join(part.text for part in parts if not part.reasoning)

    for piece in pieces:
        yield answer(splitter.push(piece))
    yield answer(splitter.finish())
