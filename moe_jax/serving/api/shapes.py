"""Answers as OpenAI's API writes them, whole and in chunks: one class for chats, one for
completions, with the same methods.

    shape = ChatShape(model, logprobs=3)
    shape.chunks(step)     # choices of chunks, for what a step adds
    shape.whole()          # the choices of the whole answer, after all steps
"""

from __future__ import annotations

import codecs
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from moe_jax.serving.api.answering import Choice, Step
from moe_jax.serving.api.grammar import Vocabulary
from moe_jax.serving.api.replies import Piece
from moe_jax.serving.request import Token

LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON cannot say


def usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """What a request cost: each prompt is counted once, whatever `n` is."""
    written = sum(choice.tokens for choice in choices)
    cached = min(prompt_tokens, sum(choice.cached_tokens for choice in choices))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Envelope:
    """What is around the choices of an answer and of each of its chunks."""

    def __init__(self, model: str, kind: str, chunk_kind: str, prefix: str):
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._rest = {"created": int(time.time()), "model": model}
        self._kind, self._chunk_kind = kind, chunk_kind

    def whole(self, choices: list[Any], used: Any) -> dict[str, Any]:
        """The answer."""
        return {
            "id": self.id,
            "object": self._kind,
            **self._rest,
            "choices": choices,
            "usage": used,
        }

    def chunk(self, choices: list[Any], **used: Any) -> dict[str, Any]:
        """A chunk."""
        return {
            "id": self.id,
            "object": self._chunk_kind,
            **self._rest,
            "choices": choices,
            **used,
        }


class ChatShape:
    """Choices of a chat."""

    def __init__(self, vocabulary: Vocabulary, logprobs: int | None):
        """`logprobs`: how many likeliest tokens are told with each; None: nothing is."""
        self._vocabulary, self._logprobs = vocabulary, logprobs
        self._pending: dict[int, list[Any]] = defaultdict(list)
        self._begun: set[int] = set()
        self._pieces: dict[int, list[Piece]] = defaultdict(list)
        self._finish: dict[int, str] = {}

    def add(self, step: Step) -> None:
        """Keeps what a step adds, for the whole answer."""
        index = step.choice.index
        self._keep_logprobs(step)
        self._pieces[index] += step.pieces
        if step.finish is not None:
            self._finish[index] = step.finish

    def whole(self) -> list[dict[str, Any]]:
        """The choices, after the last step."""
        return [
            {
                "index": index,
                "message": _message(self._pieces[index]),
                "logprobs": self._told_logprobs(index),
                "finish_reason": self._finish[index],
            }
            for index in sorted(self._finish)
        ]

    def chunks(self, step: Step) -> list[dict[str, Any]]:
        """The choices of the chunks that a step gives, one in each; often none."""
        index = step.choice.index
        self._keep_logprobs(step)
        deltas: list[dict[str, Any]] = []
        if index not in self._begun:
            self._begun.add(index)
            deltas.append({"role": "assistant", "content": ""})
        deltas += [_delta(piece) for piece in step.pieces]
        chunks = [self._chunk(index, delta, None) for delta in deltas]
        if step.finish is not None:
            chunks.append(self._chunk(index, {}, step.finish))
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        # The first chunk has only the role: log-probabilities come with text.
        told = None if "role" in delta else self._told_logprobs(index)
        return {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}

    def _keep_logprobs(self, step: Step) -> None:
        if self._logprobs is not None:
            pending = self._pending[step.choice.index]
            pending += [self._logprob(token) for token in step.tokens]

    def _told_logprobs(self, index: int) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return {"content": self._pending.pop(index, []), "refusal": None}

    def _logprob(self, token: Token) -> dict[str, Any]:
        top = [self._one(number, value) for number, value in token.top[: self._logprobs]]
        return {**self._one(token.id, token.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        content = self._vocabulary.bytes_of(token)
        return {
            "token": self._vocabulary.name_of(token),
            "logprob": json_logprob(logprob),
            "bytes": list(content),
        }


class CompletionShape:
    """Choices of a completion."""

    def __init__(self, vocabulary: Vocabulary, logprobs: int | None, echo: Sequence[str] = ()):
        """`logprobs` as in `ChatShape`; `echo`: what the text of each choice begins with."""
        self._vocabulary, self._logprobs, self._echo = vocabulary, logprobs, echo
        self._begun: set[int] = set()
        self._texts: dict[int, list[str]] = defaultdict(list)
        self._tokens: dict[int, list[Token]] = defaultdict(list)
        self._finish: dict[int, str] = {}
        self._decoders: dict[int, Any] = {}
        self._offsets: dict[int, int] = defaultdict(int)

    def add(self, step: Step) -> None:
        """Keeps what a step adds, for the whole answer."""
        index = step.choice.index
        self._texts[index].append(self._text(step))
        self._tokens[index] += step.tokens
        if step.finish is not None:
            self._finish[index] = step.finish

    def whole(self) -> list[dict[str, Any]]:
        """The choices, after the last step."""
        return [
            self._choice(index, "".join(self._texts[index]), self._finish[index])
            for index in sorted(self._finish)
        ]

    def chunks(self, step: Step) -> list[dict[str, Any]]:
        """The choices of the chunks that a step gives: one, or none where nothing is certain."""
        index, text = step.choice.index, self._text(step)
        self._tokens[index] += step.tokens
        if not text and step.finish is None:
            return []
        return [self._choice(index, text, step.finish)]

    def _text(self, step: Step) -> str:
        index, text = step.choice.index, "".join(piece.content for piece in step.pieces)
        if index in self._begun:
            return text
        self._begun.add(index)
        echo = self._echo[index] if self._echo else ""
        self._offsets[index] = len(echo)
        return echo + text

    def _choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        told = None if self._logprobs is None else self._told(index)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}

    def _told(self, index: int) -> dict[str, Any]:
        tokens = self._tokens.pop(index, [])
        name = self._vocabulary.name_of
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [json_logprob(token.logprob) for token in tokens],
            "top_logprobs": [
                {
                    name(number): json_logprob(value)
                    for number, value in (
                        *token.top[: self._logprobs],
                        (token.id, token.logprob),
                    )
                }
                for token in tokens
            ],
            "text_offset": [self._offset(index, token) for token in tokens],
        }

    def _offset(self, index: int, token: Token) -> int:
        """Where in the text a token begins, in characters."""
        decoder = self._decoders.setdefault(index, codecs.getincrementaldecoder("utf-8")("ignore"))
        begins = self._offsets[index]
        self._offsets[index] += len(decoder.decode(self._vocabulary.bytes_of(token.id)))
        return begins


def json_logprob(logprob: float | None) -> float:
    """A log-probability that JSON can say."""
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)


def _delta(piece: Piece) -> dict[str, Any]:
    if piece.call is None:
        return (
            {"reasoning_content": piece.reasoning}
            if piece.reasoning
            else {"content": piece.content}
        )
    call = piece.call
    told: dict[str, Any] = {"index": call.number}
    if call.id is not None:
        told |= {"id": call.id, "type": "function"}
    name = {} if call.name is None else {"name": call.name}
    return {"tool_calls": [{**told, "function": {**name, "arguments": call.arguments}}]}


def _message(pieces: Sequence[Piece]) -> dict[str, Any]:
    content = "".join(piece.content for piece in pieces)
    reasoning = "".join(piece.reasoning for piece in pieces)
    calls: dict[int, dict[str, Any]] = {}
    for call in (piece.call for piece in pieces if piece.call is not None):
        if call.id is not None:
            function = {"name": call.name, "arguments": ""}
            calls[call.number] = {"id": call.id, "type": "function", "function": function}
        calls[call.number]["function"]["arguments"] += call.arguments
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content or (None if calls else ""),
        "refusal": None,
    }
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message
