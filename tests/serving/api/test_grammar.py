"""Answers in JSON, with tokenizers that have special tokens for thoughts, calls and channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_jax.data.tokenizer import Tokenizer, load_tokenizer
from moe_jax.serving.api.prompts import ServedModel
from tests.serving.api.test_app import HELLO, WEATHER, chat, chunks
from tests.support.fake_serving import FakeEngine, Server, serve
from tests.support.tokenizers import CHATML_TOKENS, HARMONY, HARMONY_TOKENS, QWEN3, chat_folder

TOOLS = "{# arguments <tool_call> #}{{ (tools or [])|map(attribute='function.name')|join }}"


def server(folder: Path, template: str, tokens: list[str], end: str, says: str) -> Server:
    """A server whose model says a text with special tokens."""
    tokenizer = load_tokenizer(str(chat_folder(folder, template, tokens)))
    assert tokenizer.chat is not None
    ids = tokenizer.chat.encode(says)[0]
    ending = tokenizer.chat.tokens[end]
    model = ServedModel("fake", tokenizer, (ending,), 400)
    return serve(FakeEngine(lambda request: ids, end=ending), model=model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def test_channels(folder: Path) -> None:
    call = '<|channel|>commentary to=functions.weather json<|message|>{"city": "Paris"}'
    says = f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{call}"
    tokens = [*HARMONY_TOKENS, "<|call|>"]
    shown = server(folder, TOOLS + HARMONY, tokens, "<|call|>", says)
    (choice,) = chat(shown, tools=[WEATHER]).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.reasoning_content == "hm"
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Paris"}'
    assert choice.message.tool_calls[0].function.name == "weather"
    refused = shown.post(
        "/v1/chat/completions",
        {"model": "fake", "messages": HELLO, "tools": [WEATHER], "tool_choice": "required"},
    )
    assert refused.json()["error"]["param"] == "tool_choice"


def test_the_answer_alone_follows_the_grammar_on_channels(folder: Path) -> None:
    says = (
        "<|channel|>analysis<|message|>free {words}<|end|><|start|>assistant"
        '<|channel|>final<|message|>{"a": 1}'
    )
    shown = server(folder, HARMONY, HARMONY_TOKENS, "<|return|>", says)
    message = chat(shown, response_format={"type": "json_object"}).choices[0].message
    assert message.content == '{"a": 1}' and message.reasoning_content == "free {words}"


def test_a_thought_stays_free_and_a_demanded_call_follows(folder: Path) -> None:
    tokens = [*CHATML_TOKENS, "<think>", "</think>", "<tool_call>", "</tool_call>"]
    says = "<think>I must { call</think>" + "no" * 50
    shown = server(folder, TOOLS + QWEN3, tokens, "<|im_end|>", says)
    switch = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "switch", "parameters": switch}}
    options = {"tools": [WEATHER, tool], "parallel_tool_calls": False}
    chosen = {"type": "function", "function": {"name": "switch"}}
    (choice,) = chat(shown, tool_choice=chosen, **options).choices
    assert choice.message.reasoning_content == "I must { call"
    (called,) = choice.message.tool_calls
    assert called.function.name == "switch" and not choice.message.content
    assert json.loads(called.function.arguments) in ({"on": False}, {"on": True})
    parts: list[Any] = chunks(shown, tools=[WEATHER])
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == "no" * 50  # nothing was demanded


def test_a_schema_and_special_tokens_of_a_tokenizer(folder: Path) -> None:
    shown = server(folder, QWEN3, CHATML_TOKENS, "<|im_end|>", '{"b": [2]}<|im_start|>')
    schema = {"type": "object", "properties": {"b": {"type": "array"}}, "required": ["b"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    (choice,) = chat(shown, response_format=wanted, logprobs=True).choices
    assert json.loads(choice.message.content) == {"b": [2]}
    names = [entry.token for entry in choice.logprobs.content]
    assert "".join(names) == choice.message.content
    model = shown.api.model
    assert model is not None
    tokenizer: Tokenizer = model.tokenizer
    special = tokenizer.special_ids["<|im_start|>"]
    assert model.vocabulary.name_of(special) == "<|im_start|>"
    assert model.vocabulary.bytes_of(tokenizer.encode("é")[0])[0] == 0xC3
