"""The key, the size of a body, and what the log says."""

from __future__ import annotations

from typing import Any

import pytest

from moe_jax.serving.api.app import Limits
from tests.support.fake_serving import FakeEngine, serve


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nothing"])
def test_every_route_but_health_needs_a_key(path: str) -> None:
    server = serve(keys=[b"first", b"second"])
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first"}):
        response = server.get(path, headers=header)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    for key in ("first", "second"):
        response = server.get(path, headers={"Authorization": f"Bearer {key}"})
        assert response.status_code in (200, 404)
    assert server.get("/health").status_code == 200


def test_a_body_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(limits=Limits(max_body=100))
    body = {"model": "fake", "prompt": "x" * 200}
    response = server.post("/v1/completions", body)
    assert response.status_code == 413 and "100 bytes" in response.json()["error"]["message"]

    async def parts() -> Any:
        for _ in range(20):
            yield b" " * 10

    response = server.run(lambda client: client.post("/v1/completions", content=parts()))
    assert response.status_code == 413


def test_the_log_has_no_text_of_requests(capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(FakeEngine())
    server.post("/v1/completions", {"model": "fake", "prompt": "secret", "user": "me\n"})
    server.post("/v1/completions", {"model": "fake", "prompt": "secret", "n": "secret"})
    server.get("/health")  # which is asked all the time
    (first, second) = server.log
    assert first.startswith("POST /v1/completions 200, ")
    assert first.endswith(r", user 'me\n', 6 + 6 tokens")
    assert second.startswith("POST /v1/completions 400, ")

    def fail(request: Any) -> Any:
        raise RuntimeError(bytes(request.prompt).decode())

    server.engine.say = fail
    response = server.post("/v1/completions", {"model": "fake", "prompt": "secret"})
    assert response.status_code == 500 and response.json()["error"]["code"] == "server_error"
    told = capsys.readouterr().err + "".join(server.log) + response.text
    assert "RuntimeError in a request" in told and "secret" not in told.lower()
