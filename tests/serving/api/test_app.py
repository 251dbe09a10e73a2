"""The routes, with the client that OpenAI publishes, over an engine without a model."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from moe_jax.serving.api.app import Limits
from moe_jax.serving.request import Finished
from tests.support import ROOT
from tests.support.fake_serving import TOOLS, FakeEngine, Server, saying, serve

HELLO = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def chat(server: Server, messages: Any = HELLO, **options: Any) -> Any:
    return server.ask(
        lambda client: client.chat.completions.create(model="fake", messages=messages, **options)
    )


def chunks(server: Server, kind: str = "chat", **options: Any) -> list[Any]:
    async def use(client: openai.AsyncOpenAI) -> list[Any]:
        if kind == "chat":
            options.setdefault("messages", HELLO)
            create: Any = client.chat.completions.create
        else:
            create = client.completions.create
        return [chunk async for chunk in await create(model="fake", stream=True, **options)]

    return server.ask(use)


def test_a_chat_and_its_stream() -> None:
    server = serve()
    answer = chat(server)
    (choice,) = answer.choices
    assert choice.message.content == "HELLO" and choice.finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 5)
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert answer.object == "chat.completion" and answer.model == "fake"
    parts = chunks(server, stream_options={"include_usage": True})
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts[:-1])
    assert text == "HELLO" and parts[-2].choices[0].finish_reason == "stop"
    assert parts[-1].choices == [] and parts[-1].usage.total_tokens == 15
    assert {part.id for part in parts} == {parts[0].id}


def test_completions_of_several_prompts_and_answers() -> None:
    server = serve()
    answer = server.ask(
        lambda client: client.completions.create(
            model="fake", prompt=["ab", "cd"], n=2, echo=True, seed=5
        )
    )
    assert [choice.text for choice in answer.choices] == ["abAB", "abAB", "cdCD", "cdCD"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 4 and answer.usage.completion_tokens == 8
    assert [request.sampling.seed for request in server.engine.requests] == [5, 6, 7, 8]
    tokens = server.ask(
        lambda client: client.completions.create(model="fake", prompt=[97, 98], max_tokens=1)
    )
    assert tokens.choices[0].text == "A" and tokens.choices[0].finish_reason == "length"
    parts = chunks(server, "completions", prompt=["ab", "cd"])
    texts = {0: "", 1: ""}
    for part in parts:
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == {0: "AB", 1: "CD"}


def test_log_probabilities() -> None:
    server = serve(FakeEngine(saying("é!")))
    content = chat(server, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [entry.token for entry in content] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert content[0].bytes == [0xC3] and content[2].logprob == -0.5
    assert [len(entry.top_logprobs) for entry in content] == [2, 2, 2]
    parts = chunks(server, logprobs=True)
    told = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs]
    assert [entry.token for some in told for entry in some.content] == [
        "bytes:\\xc3",
        "bytes:\\xa9",
        "!",
    ]
    answer = server.ask(
        lambda client: client.completions.create(model="fake", prompt="x", logprobs=3)
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs == [-0.5] * 3 and logprobs.text_offset == [0, 0, 1]
    assert logprobs.top_logprobs[2] == {"!": -0.5, "\x00": -2.0, "\x01": -9999.0}


def test_stop_strings_are_held_back_and_stop_the_engine() -> None:
    server = serve(FakeEngine(saying("one END two"), holding=True))
    answer = chat(server, stop=["END", "never"])
    assert answer.choices[0].message.content == "one " and answer.choices[0].finish_reason == "stop"
    assert server.engine.streams[0].cancelled
    parts = chunks(server, stop="END")
    texts = [part.choices[0].delta.content or "" for part in parts]
    assert "".join(texts) == "one " and not any("E" in text for text in texts)
    assert server.api.open_answers == 0


def test_the_template_is_told_what_to_do() -> None:
    server = serve()
    chat(server, reasoning_effort="none", extra_body={"chat_template_kwargs": {"reply": "hi:"}})
    assert bytes(server.engine.requests[0].prompt).endswith(b"hi:")
    assert server.engine.requests[0].max_tokens == 200 - len(server.engine.requests[0].prompt)


def test_reasoning_is_apart() -> None:
    server = serve(FakeEngine(saying("<think>\nhm</think>\n\nyes")))
    message = chat(server).choices[0].message
    assert message.reasoning_content == "\nhm" and message.content == "yes"
    deltas = [part.choices[0].delta for part in chunks(server)]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "\nhm"
    assert "".join(delta.content or "" for delta in deltas) == "yes"


def test_tools_are_called_and_answered() -> None:
    server = serve(FakeEngine(saying(f"Let me see.\n{CALL}\n{CALL}")), chat=TOOLS)
    answer = chat(server, tools=[WEATHER])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    assert [call.function.arguments for call in choice.message.tool_calls] == [
        '{"city": "Paris"}'
    ] * 2
    calls: dict[int, list[str]] = {}
    parts = chunks(server, tools=[WEATHER], parallel_tool_calls=False)
    for call in (call for part in parts for call in part.choices[0].delta.tool_calls or []):
        name, arguments = calls.setdefault(call.index, ["", ""])
        calls[call.index] = [
            name + (call.function.name or ""),
            arguments + (call.function.arguments or ""),
        ]
    assert calls == {0: ["weather", '{"city": "Paris"}']}
    assert parts[-1].choices[0].finish_reason == "tool_calls"
    assert chat(server, tools=[WEATHER], tool_choice="none").choices[0].finish_reason == "stop"


def test_an_answer_in_json() -> None:
    server = serve(FakeEngine(saying("Sure: yes")), limits=Limits(max_batch=2))
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["no", "maybe"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    text = chat(server, response_format=wanted).choices[0].message.content
    assert json.loads(text) in ({"answer": "no"}, {"answer": "maybe"})
    thinking = serve(FakeEngine(saying("<think>any?</think>{}")))
    answer = chat(thinking, response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content) == {}


def test_a_demanded_tool_is_called() -> None:
    server = serve(FakeEngine(saying("?" * 150)), chat=TOOLS)
    chosen = {"type": "function", "function": {"name": "weather"}}
    message = chat(server, tools=[WEATHER], tool_choice=chosen).choices[0].message
    assert message.tool_calls[0].function.name == "weather" and not message.content


# What is refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "model"),
        ({"model": "fake"}, "messages"),
        ({"model": "other", "messages": HELLO}, "model"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"n": True}, "n"),
        ({"store": True}, "store"),
        ({"functions": []}, "functions"),
        ({"stream_options": {}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 500}, "max_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"min_tokens": 50, "max_tokens": 3}, "min_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"logit_bias": {"no": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"tools": [WEATHER]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"no": 1}}, "chat_template_kwargs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nothing"}},
                }
            },
            "response_format",
        ),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_by_name(body: Any, param: str) -> None:
    whole = {"model": "fake", "messages": HELLO, **body} if body and "model" not in body else body
    response = serve().post("/v1/chat/completions", whole)
    error = response.json()["error"]
    assert response.status_code == (404 if whole.get("model") == "other" else 400), error
    assert error["param"] == param and error["message"].endswith(".")
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"model": NaN}', b"[]"),
        *(b'{"model": "fake", "prompt": "x", "n": 1e999}', b'{"model": "\\ud800"}', b"null"),
        b'{"model": "fake", "prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
        b'{"model": "fake", "prompt": [' + b'1,"a",' * 100_000 + b"1]}",
        b'{"model": "fake", "prompt": "' + b"x" * 5_000_000 + b'"}',
        *(b'{"model": "fake", "prompt": []}', b'{"model": "fake", "prompt": ""}'),
    ],
    ids=lambda content: repr(content[:20]),
)
def test_malformed_bodies_are_the_clients_mistake(content: bytes) -> None:
    server = serve()
    response = server.run(lambda client: client.post("/v1/completions", content=content))
    assert 400 <= response.status_code < 500 and response.json()["error"]["message"]
    assert server.engine.requests == []


def test_unknown_routes_and_methods_have_the_envelope() -> None:
    server = serve()
    assert server.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert server.get("/v1/completions").status_code == 405


# Limits


def test_a_full_server_says_when_to_come_again() -> None:
    server = serve(FakeEngine(holding=True), limits=Limits(max_batch=1, max_waiting=1))

    async def talk(client: Any) -> Any:
        body = {"model": "fake", "prompt": "x", "n": 2}
        first = asyncio.create_task(client.post("/v1/completions", json=body))
        while server.api.open_answers < 2:
            await asyncio.sleep(0.001)
        response = await client.post("/v1/completions", json=body | {"n": 1})
        for stream in server.engine.streams:
            stream.events.append(Finished("length"))
        first.cancel()
        return response

    response = server.run(talk)
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    assert (
        serve(limits=Limits(1, 1))
        .post("/v1/completions", {"model": "fake", "prompt": "x", "n": 3})
        .json()["error"]["param"]
        == "n"
    )


def test_a_request_has_a_time_limit() -> None:
    server = serve(FakeEngine(holding=True), limits=Limits(request_seconds=0.05))
    response = server.post("/v1/completions", {"model": "fake", "prompt": "x"})
    assert response.status_code == 504 and server.engine.streams[0].cancelled
    assert server.api.open_answers == 0


def test_a_client_that_goes_away_cancels() -> None:
    server = serve(FakeEngine(holding=True))

    async def talk() -> None:
        body = b'{"model": "fake", "prompt": "x", "stream": true}'
        messages: asyncio.Queue[Any] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)
            if message.get("body"):
                messages.put_nowait({"type": "http.disconnect"})

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [],
        }
        await server.app(scope, messages.get, send)
        while server.api.open_answers:
            await asyncio.sleep(0.001)
        assert sent[0]["status"] == 200

    asyncio.run(asyncio.wait_for(talk(), 60))
    assert server.engine.streams[0].cancelled


def test_an_engine_that_fails_is_a_503() -> None:
    server = serve(FakeEngine(failing=True))
    assert server.post("/v1/completions", {"model": "fake", "prompt": "x"}).status_code == 503
    parts = server.post(
        "/v1/chat/completions", {"model": "fake", "messages": HELLO, "stream": True}
    )
    assert parts.status_code == 503


# The other routes


def test_models_tokens_and_health() -> None:
    server = serve()
    assert server.ask(lambda client: client.models.list()).data[0].id == "fake"
    assert server.ask(lambda client: client.models.retrieve("fake")).max_model_len == 200
    assert server.get("/v1/models/none").status_code == 404
    tokens = server.post("/tokenize", {"prompt": "hé", "return_token_strs": True}).json()
    assert tokens["tokens"] == [104, 195, 169] and tokens["count"] == 3
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "hé"}
    assert server.post("/tokenize", {"messages": HELLO}).json()["count"] == 10
    assert server.post("/tokenize", {}).status_code == 400
    assert server.get("/health").json() == {"status": "ready"}
    server.engine.step = 6.0
    slow = server.get("/health")
    assert slow.status_code == 200
    assert slow.json() == {"status": "degraded", "reasons": ["slow_steps"]}
    server.api.open_answers, server.engine.step = 160, 0.0
    assert server.get("/health").json()["reasons"] == ["queue_full"]
    server.api.open_answers, server.engine.stalled = 0, 1000.0
    assert server.get("/health").status_code == 503
    server.engine.failed = "its device is gone"
    assert server.get("/health").json() == {"status": "failed"}
    server.api.drain()
    assert server.get("/health").json() == {"status": "draining"}
    response = server.post("/v1/completions", {"model": "fake", "prompt": "x"})
    assert response.status_code == 503 and response.headers["retry-after"]
    assert serve(ready=False).get("/health").status_code == 503


def test_metrics_and_experts() -> None:
    server = serve()
    chat(server)
    server.post("/v1/completions", {"model": "fake"})
    text = server.get("/metrics").text
    for line in (
        'vllm:num_requests_running{model_name="fake"} 3.0',
        'vllm:kv_cache_usage_perc{model_name="fake"} 0.25',
        'vllm:generation_tokens_total{model_name="fake"} 5.0',
        'vllm:prompt_tokens_total{model_name="fake"} 10.0',
        'vllm:time_to_first_token_seconds_count{model_name="fake"} 1.0',
        'vllm:inter_token_latency_seconds_count{model_name="fake"} 4.0',
        'vllm:request_queue_time_seconds_sum{model_name="fake"} 0.25',
        'vllm:request_success_total{finished_reason="stop",model_name="fake"} 1.0',
        'moe_jax:request_errors_total{model_name="fake",status="400"} 1.0',
        'moe_jax:expert_load_max_over_mean{layers="0",model_name="fake"} 4.0',
        'moe_jax:expert_dead_experts{layers="0",model_name="fake"} 3.0',
        'moe_jax:device_load_max_over_mean{layers="0",model_name="fake"} 2.0',
        'moe_jax:device_load_max_over_mean{layers="1",model_name="fake"} 1.0',
        'moe_jax:expert_moves_total{model_name="fake"} 2.0',
        'moe_jax:expert_move_seconds_total{model_name="fake"} 0.25',
    ):
        assert line in text.splitlines(), text
    experts = server.get("/v1/experts").json()
    assert experts["choices"] == [[4, 0, 0, 0], [1, 1, 1, 1]]
    assert experts["slots"][1] == [0, 2, 1, 3] and experts["device_choices"] == [[4, 0], [2, 2]]
    assert experts["moves"]["longest_pause_seconds"] == 0.25


def test_openapi_has_every_field_of_the_table() -> None:
    schema = serve().get("/openapi.json").json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rpartition("/")[2]
    properties = schema["components"]["schemas"][name]["properties"]
    assert properties["min_p"]["anyOf"][0]["maximum"] == 1
    assert properties["best_of"]["description"].startswith("Refused")
    used = str(schema["components"])
    for reference in {part.split("'")[0] for part in used.split("#/components/schemas/")[1:]}:
        assert reference in schema["components"]["schemas"]


def test_the_dashboard_asks_for_what_there_is() -> None:
    board = json.loads((ROOT / "docs" / "serving_dashboard.json").read_text())
    expressions = " ".join(
        target["expr"] for panel in board["panels"] for target in panel["targets"]
    )
    server = serve()
    chat(server)
    server.get("/v1/none")
    there = set(re.findall(r"(?m)^((?:vllm|moe_jax):\w+)\{", server.get("/metrics").text))
    asked = set(re.findall(r"(?:vllm|moe_jax):\w+", expressions))
    assert len(asked) >= 12 and asked <= there


def test_bodies_and_chunks_are_what_openai_publishes() -> None:
    server = serve(FakeEngine(saying(f"<think>hm</think>{CALL}")), chat=TOOLS)
    body = {"model": "fake", "messages": HELLO, "tools": [WEATHER], "logprobs": True}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    for path, asked, whole, chunk in (
        ("chat/completions", body, ChatCompletion, ChatCompletionChunk),
        ("completions", {"model": "fake", "prompt": "x", "logprobs": 2}, Completion, Completion),
    ):
        response = server.post(f"/v1/{path}", asked)
        whole.model_validate_json(response.content, strict=True)
        events = server.post(f"/v1/{path}", asked | usage).text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        for event in events[:-2]:
            chunk.model_validate_json(event.removeprefix("data: "), strict=True)
