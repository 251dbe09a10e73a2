"""The table of fields: what it refuses, and what is written from it."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from moe_jax.serving.api.bodies import read_body
from moe_jax.serving.api.errors import ApiError
from moe_jax.serving.api.fields import BODIES, CHAT, COMPLETION
from tests.support import ROOT
from tests.support.fake_serving import FakeEngine, saying, serve

VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "fake", "messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"model": "fake", "prompt": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}
ODD: list[Any] = [
    *(None, True, 0, -1, 1, 2.5, 1e308, 2**63, 2**200, "", "x", "\x00", "é" * 2000),
    *(
        [],
        [[]],
        [None],
        [1],
        ["x"],
        [["x"]],
        [{}],
        {},
        {"type": "function"},
        {"type": "json_object"},
    ),
    *({"1": 1}, {"a": {"b": [1]}}, [{"role": "user"}], [{"type": "text", "text": "x"}]),
]


def test_odd_values_of_any_field_do_not_break_the_server() -> None:
    server = serve(FakeEngine(saying("ok")))
    bodies = [
        (path, {**VALID[path], field.name: value})
        for path, table in BODIES.items()
        for number, field in enumerate(table.fields)
        if path != "/v1/completions" or field not in CHAT.fields
        for value in ODD[number % 3 :: 3]
    ]

    async def talk(client: Any) -> set[int]:
        return {(await client.post(path, json=body)).status_code for path, body in bodies}

    assert server.run(talk) == {200, 400, 404}
    assert server.api.open_answers == 0


@pytest.mark.parametrize("table", [CHAT, COMPLETION], ids=lambda table: table.name)
def test_refused_fields_take_what_changes_nothing(table: Any) -> None:
    path = next(path for path, other in BODIES.items() if other is table)
    refused = [field for field in table.fields if field.refused]
    assert len(refused) >= 2
    for field in refused:
        body = {**VALID[path], field.name: {"any": "thing"}}
        with pytest.raises(ApiError) as caught:
            read_body(table, _encoded(body))
        assert caught.value.param == field.name
        assert caught.value.message == f"{field.name} is not supported: {field.about}"
        read_body(table, _encoded({**VALID[path], field.name: None}))
    neutral = {"best_of": 1} if table is COMPLETION else {"store": False, "service_tier": "auto"}
    read_body(table, _encoded({**VALID[path], **neutral}))


def _encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


def test_the_document_has_the_table() -> None:
    place = ROOT / "scripts" / "serving_docs.py"
    spec = importlib.util.spec_from_file_location("serving_docs", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0
    assert "| `best_of` |  | refused | only null or `1` |" in module.TARGET.read_text()
