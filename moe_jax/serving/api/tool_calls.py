"""Calls of tools in what a model writes, as the text comes.

    calls = TaggedCalls()
    for text in pieces:
        for piece in calls.push(text):     # str: of the answer; CallPiece: of a call

Two forms are known: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` in the text (Qwen3,
Hermes), and gpt-oss's messages to `functions.NAME`, which `generation/reasoning.py` tells apart.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.data.chat_template import ChatTemplate
from moe_jax.generation.reasoning import Part, split_at

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_OTHER_FORMS = ("<function=", "<arg_key>")  # Qwen3-Coder's and GLM's, within the same tags
_FUNCTIONS = "functions."


class CallPiece(NamedTuple):
    """A part of a call: the first one has its id and name, all of them more of its arguments."""

    number: int
    """Of the call in its answer, from 0."""
    arguments: str
    id: str | None = None
    name: str | None = None


def is_tagged(chat: ChatTemplate) -> bool:
    """Whether a template teaches a model the form of `TaggedCalls`."""
    others = any(form in chat.source for form in _OTHER_FORMS)
    return OPEN in chat.source and "arguments" in chat.source and not others


class TaggedCalls:
    """Finds calls between tags. What stands in tags and is no call remains a part of the answer."""

    marks = (OPEN, CLOSE)

    def __init__(self) -> None:
        self.count = 0
        """Calls so far that are whole."""
        self._held, self._inside = "", False
        self._arguments: _JsonObject | None = None

    def push(self, text: str) -> Iterator[str | CallPiece]:
        """What is certain after more text."""
        self._held += text
        while (piece := self._next()) is not None:
            if piece:
                yield piece

    def finish(self) -> Iterator[str | CallPiece]:
        """What was held back. A call that the model did not finish is what there is of it."""
        held, self._held = self._held, ""
        if not self._inside:
            if held.strip() or (held and not self.count):
                yield held
        elif self._arguments is None:
            yield from self._whole(held, closed="")

    def _next(self) -> str | CallPiece | None:
        """The next piece, perhaps empty; None where more text is needed."""
        if not self._inside:
            return self._text()
        if self._arguments is None:
            return self._begin()
        if not self._arguments.ended:
            written, self._held = self._arguments.take(self._held)
            return CallPiece(self.count, written) if written else None
        _, closed, rest = split_at(self._held, [CLOSE])
        if not closed:
            return None
        self._held, self._inside, self._arguments = rest, False, None
        self.count += 1
        return ""

    def _text(self) -> str | None:
        """Text up to a call; blanks in front of one and behind it belong to neither."""
        text, mark, rest = split_at(self._held, [OPEN])
        if mark:
            self._held, self._inside = rest, True
            return text.rstrip()
        certain = text.rstrip()
        self._held = self._held[len(certain) :]
        return certain or None

    def _begin(self) -> str | CallPiece | None:
        if head := _HEAD.match(self._held):
            self._held, self._arguments = self._held[head.end() :], _JsonObject()
            return CallPiece(self.count, "", _new_id(), json.loads(head[1], strict=False))
        body, closed, rest = split_at(self._held, [CLOSE])
        if not closed:
            return None
        self._held, self._inside = rest, False
        (piece,) = self._whole(body, closed)
        return piece

    def _whole(self, body: str, closed: str) -> Iterator[str | CallPiece]:
        """A call whose parts come in another order, or the text in its place."""
        try:
            call = json.loads(body)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            name, arguments = None, None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            yield OPEN + body + closed
            return
        written = json.dumps(arguments, ensure_ascii=False)
        yield CallPiece(self.count, written, _new_id(), name)
        self.count += 1


class ChannelCalls:
    """Calls in the parts of a reply that has channels."""

    marks = ()

    def __init__(self) -> None:
        self.count = 0
        """Calls that have begun: a reply of this form ends with a call."""
        self._message = 0

    def push(self, part: Part) -> CallPiece | None:
        """The piece of a call that a part is, if it is one."""
        if part.call is None or not part.call[1].startswith(_FUNCTIONS):
            return None
        number, recipient = part.call
        if number == self._message:
            return CallPiece(self.count - 1, part.text)
        self._message = number
        self.count += 1
        name = recipient.removeprefix(_FUNCTIONS)
        return CallPiece(self.count - 1, part.text, _new_id(), name)


class _JsonObject:
    """Finds where an object ends that begins with the next character."""

    def __init__(self) -> None:
        self.ended = False
        self._depth, self._string, self._escaped = 0, False, False

    def take(self, text: str) -> tuple[str, str]:
        """(what belongs to the object, what follows it)"""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._string:
                self._escaped = character == "\\"
                self._string = character != '"'
            elif character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.ended = True
                    return text[: at + 1], text[at + 1 :]
        return text, ""


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"
