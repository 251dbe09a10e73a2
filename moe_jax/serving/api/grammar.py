"""Tokens as bytes, and which tokens may come next where an answer must be JSON: llguidance keeps
the state of a grammar.

    vocabulary = Vocabulary(tokenizer, eos_ids)
    token_filter = AnswerFilter(vocabulary, json_grammar({"type": "object"}), Thoughts())
    token_filter.allowed()             # bool [num_ids]
    token_filter.accept(token)

What a model thinks before it answers stays free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from moe_jax.data.chat_template import CHANNEL, THOUGHTS
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.generation.reasoning import ANSWER_CHANNEL, MESSAGE_MARK, Channels, Thoughts
from moe_jax.serving.api.errors import ApiError
from moe_jax.serving.api.tool_calls import CLOSE, OPEN

# A model that is not sure would otherwise write blanks without end.
_JSON: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,20}"}


class Vocabulary:
    """What the tokens of a tokenizer are as bytes."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int]):
        self.tokenizer = tokenizer
        self._eos_ids = list(eos_ids)
        self._special = {number: name for name, number in tokenizer.special_ids.items()}

    @cached_property
    def grammar(self) -> LLTokenizer:
        """The tokenizer as llguidance knows it; making it may take a second.

        Raises ApiError for one that it cannot read.
        """
        if self.tokenizer.fingerprint == "bytes":
            return LLTokenizer(TokenizerWrapper(_Bytes(self.tokenizer)), eos_token=self._eos_ids)
        try:
            return LLTokenizer(
                self.tokenizer.fingerprint,
                n_vocab=self.tokenizer.num_ids,
                eos_token=self._eos_ids,
            )
        except Exception as error:  # the library raises bare ones for what it cannot read
            raise ApiError(
                400,
                "response_format and a demanded tool are not supported with this model's "
                "tokenizer, which is not a tokenizer.json that llguidance reads.",
                param="response_format",
                code="unsupported_parameter",
            ) from error

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; those of a special token are its name's."""
        if token in self._special:
            return self._special[token].encode()
        if self.tokenizer.fingerprint == "bytes":
            return bytes([token]) if token < 256 else b""
        text = self.tokenizer.decode([token])
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode()
        try:
            return bytes(self.grammar.decode_bytes([token]))
        except ApiError:  # a tokenizer of another kind: as much as its text says
            return text.encode()

    def name_of(self, token: int) -> str:
        """A token in the lists of log-probabilities: its text, or its bytes where they are none."""
        content = self.bytes_of(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class _Bytes:
    """The byte tokenizer as llguidance asks for one."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id = tokenizer.eos_id
        self.tokens = [bytes([byte]) for byte in range(256)] + [b"<end>"]
        self.special_token_ids = [tokenizer.eos_id]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def json_grammar(schema: Mapping[str, Any]) -> str:
    """JSON that matches a schema."""
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)


def calls_grammar(vocabulary: Vocabulary, tools: Sequence[Any], parallel: bool) -> str:
    """One or more calls of these functions, in tags; `tools` have a name and parameters."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                "arguments": tool.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
            "x-guidance": _JSON,
        }
        for tool in tools
    ]
    names = "|".join(f"call{number}" for number in range(len(calls)))
    rules = [f"call{number}: %json {json.dumps(call)}" for number, call in enumerate(calls)]
    chat = vocabulary.tokenizer.chat
    tokens = chat.tokens if chat else {}
    begin, end = (mark if mark in tokens else json.dumps(mark) for mark in (OPEN, CLOSE))
    more = '("\\n" one)*' if parallel else ""
    rules = [f"start: one {more}", f'one: {begin} "\\n" ({names}) "\\n" {end}', *rules]
    return LLMatcher.grammar_from_lark("\n".join(rules))


def check_grammar(vocabulary: Vocabulary, grammar: str, param: str) -> None:
    """Raises ApiError where a schema cannot be followed."""
    if problem := LLMatcher.validate_grammar(grammar, vocabulary.grammar):
        cause = " ".join(problem.split())[:200]
        raise ApiError(400, f"{param} has a schema that cannot be followed ({cause}).", param=param)


class AnswerFilter:
    """Which tokens may come next in a reply whose answer follows a grammar."""

    def __init__(self, vocabulary: Vocabulary, grammar: str, splitter: Thoughts | Channels):
        self._vocabulary, self._size = vocabulary, vocabulary.tokenizer.num_ids
        self._matcher = LLMatcher(vocabulary.grammar, grammar, log_level=0)
        chat = vocabulary.tokenizer.chat
        self._tokens = chat.tokens if chat else {}
        self._channels = isinstance(splitter, Channels)
        self._free = self._channels
        self._until, self._said = "", b""  # the end of a thought, and what it says so far
        self._first = True
        if isinstance(splitter, Thoughts) and splitter.begun_end is not None:
            self._free, self._until = True, splitter.begun_end
        self._header: list[int] | None = None

    def allowed(self) -> np.ndarray:
        """Bool [num_ids]: the tokens that may come next."""
        if self._free:
            return np.ones(self._size, bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self._size].astype(bool)
        if self._first:  # the model may think first
            allowed[[self._tokens[mark] for mark in THOUGHTS if mark in self._tokens]] = True
        return allowed

    def accept(self, token: int) -> None:
        """Goes on behind a token that was drawn."""
        first, self._first = self._first, False
        if self._free:
            self._hear(token)
            return
        begun = next((mark for mark in THOUGHTS if self._tokens.get(mark) == token), None)
        if first and begun is not None:
            self._free, self._until = True, THOUGHTS[begun]
        else:
            self._matcher.consume_token(token)

    def _hear(self, token: int) -> None:
        """Listens, in what is free, for the beginning of the answer."""
        if not self._channels:
            self._said = (self._said + self._vocabulary.bytes_of(token))[-64:]
            self._free = not self._said.rstrip().endswith(self._until.encode())
        elif token == self._tokens.get(CHANNEL):
            self._header = []
        elif token == self._tokens.get(MESSAGE_MARK):
            name = self._vocabulary.tokenizer.decode(self._header or [])
            self._free, self._header = not name.strip().startswith(ANSWER_CHANNEL), None
        elif self._header is not None:
            self._header.append(token)
