"""Calls in a reply, however the text is cut."""

from __future__ import annotations

import dataclasses
import json

import pytest

from moe_jax.generation.reasoning import Channels
from moe_jax.serving.api.tool_calls import CallPiece, ChannelCalls, TaggedCalls, is_tagged
from tests.support import fake_model

TEXT = (
    'Let me see.\n<tool_call>\n{"name": "wea\\"ther", "arguments": {"city": "P}a\\"ris", '
    '"list": [1, {"a": 2}]}}\n</tool_call>\n<tool_call>\n{"arguments": {}, "name": "b"}\n'
    "</tool_call>\n<tool_call>junk</tool_call> and <tool_callx\n"
)


def gathered(pieces: list[str | CallPiece]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and each call's name and arguments."""
    calls: dict[int, tuple[str, str]] = {}
    for piece in pieces:
        if isinstance(piece, CallPiece):
            assert (piece.id is None) == (piece.name is None) == (piece.number in calls)
            name, arguments = calls.get(piece.number, (piece.name or "", ""))
            calls[piece.number] = name, arguments + piece.arguments
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, [calls[number] for number in sorted(calls)]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_between_tags(size: int) -> None:
    calls = TaggedCalls()
    pieces = [
        piece for at in range(0, len(TEXT), size) for piece in calls.push(TEXT[at : at + size])
    ]
    text, found = gathered([*pieces, *calls.finish()])
    assert text == "Let me see.<tool_call>junk</tool_call> and <tool_callx"
    (first, arguments), second = found
    assert first == 'wea"ther' and second == ("b", "{}")
    assert json.loads(arguments) == {"city": 'P}a"ris', "list": [1, {"a": 2}]}
    assert calls.count == 2


@pytest.mark.parametrize(
    ("text", "said", "found"),
    [
        ("no call \n", "no call \n", []),
        ('<tool_call>{"name": "a", "arguments": {"x": 1', "", [("a", '{"x": 1')]),
        ('<tool_call>{"name": "a", "argu', '<tool_call>{"name": "a", "argu', []),
        ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', None, []),
        ('<tool_call>["name"]</tool_call>', None, []),
    ],
)
def test_what_a_model_does_not_finish(text: str, said: str | None, found: list[object]) -> None:
    calls = TaggedCalls()
    assert gathered([*calls.push(text), *calls.finish()]) == (text if said is None else said, found)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_calls_on_channels(size: int) -> None:
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.weather json<|message|>{"city": 1}<|call|>'
        "<|start|>assistant to=functions.b<|channel|>commentary<|message|>{}"
    )
    channels, calls = Channels(), ChannelCalls()
    parts = [
        part for at in range(0, len(text), size) for part in channels.push(text[at : at + size])
    ]
    pieces = [(part, calls.push(part)) for part in [*parts, *channels.finish()]]
    found = gathered([piece for _, piece in pieces if piece is not None])[1]
    assert found == [("weather", '{"city": 1}'), ("b", "{}")]
    assert "".join(part.text for part, piece in pieces if piece is None) == "hm"


def test_which_templates_write_calls_between_tags() -> None:
    def source(text: str) -> bool:
        return is_tagged(dataclasses.replace(fake_model.TEMPLATE, source=text))

    assert source('<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}')
    assert not source("<tool_call><function=name> arguments")
    assert not source("<tool_call>name<arg_key> arguments")
    assert not source("[TOOL_CALLS] arguments")
