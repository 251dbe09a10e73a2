"""What is no request, or a strange one, gets a refusal that says so, and the server goes on."""

from __future__ import annotations

from typing import Any

from tests.support.fake_serving import TOOLS, FakeEngine, Server, saying, serve
from tests.support.schema_bodies import VALID, SchemaBodies, check_refusal, malformed_bodies

DRAWN = 60  # bodies per route, kept and broken


def still_answers(server: Server) -> None:
    assert server.api.open_answers == 0
    assert server.post("/v1/completions", VALID).status_code == 200


def test_malformed_bodies_are_refused_and_nothing_breaks() -> None:
    server = serve(FakeEngine(saying("ok")))
    bodies = list(malformed_bodies(VALID))
    assert len(bodies) > 200

    async def talk(client: Any) -> list[Any]:
        routes = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
        return [
            await client.post(route, content=body)
            for number, body in enumerate(bodies)
            for route in (routes if number % 10 == 0 else routes[:1])
        ]

    for response in server.run(talk):
        check_refusal(response)
    still_answers(server)


def test_bodies_drawn_from_our_own_schema_are_answered_or_refused_by_name() -> None:
    """What the schema allows may still be refused, where fields do not go together; what it
    forbids always is.
    """
    server = serve(FakeEngine(saying('{"a": 1}')), chat=TOOLS)
    bodies = SchemaBodies(server.get("/openapi.json").json())
    assert len(bodies.routes) == 4

    async def talk(client: Any) -> list[tuple[str, Any, bool, Any]]:
        found = []
        for path in bodies.routes:
            for number in range(2 * DRAWN):
                kept = number < DRAWN
                body = bodies.kept(path) if kept else bodies.broken(path)
                if "model" in body and isinstance(body["model"], str):
                    body["model"] = "fake"
                found.append((path, body, kept, await client.post(path, json=body)))
        return found

    answered = 0
    for path, body, kept, response in server.run(talk):
        assert response.status_code in ((200, 400) if kept else (400,)), (path, body, response.text)
        answered += response.status_code == 200
        if response.status_code == 400:
            error = response.json()["error"]
            assert error["message"] and (error["param"] or error["code"]), (body, error)
    assert answered > DRAWN // 2
    still_answers(server)
