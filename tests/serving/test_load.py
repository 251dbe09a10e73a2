"""What `moe-jax bench-serve` measures, against a server without a model."""

from __future__ import annotations

import json
import socket

import pytest

from moe_jax.errors import UserError
from moe_jax.serving.load import RequestLoad, ServerUnderLoad, measure_server
from tests.support.command import call
from tests.support.fake_serving import FakeEngine, running, saying, serve


def test_figures_of_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(FakeEngine(saying("abcdefgh" * 10)))
    with running(server) as client:
        url = str(client.base_url)
        load = RequestLoad(requests=6, concurrency=2, prompt_tokens=50, answer_tokens=5, rate=500.0)
        figures = measure_server(ServerUnderLoad(url), load)
        assert figures["requests"] == 6 and figures["errors"] == {}
        rate = figures["generated_tokens_per_second"]
        assert rate == pytest.approx(6 * 5 / figures["seconds"])
        spread = figures["first_token_seconds"]
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"] <= spread["most"]
        assert spread["most"] <= figures["request_seconds"]["most"] < figures["seconds"]
        prompts = {request.prompt for request in server.engine.requests}
        assert len(prompts) == 6 and {len(prompt) for prompt in prompts} == {50}
        shape = ("--requests", 2, "--input", 500, "--output", 2)
        assert call("bench-serve", url, *shape) == 2  # longer than the context
        assert "no request succeeded: 400 The prompt has 500 tokens" in capsys.readouterr().err
        assert call("bench-serve", url, "--requests", 2, "--input", 5, "--output", 2, "--json") == 0
        assert json.loads(capsys.readouterr().out)["requests"] == 2
        assert call("bench-serve", url, "--requests", 2, "--input", 5, "--output", 2) == 0
        assert "time to first token" in capsys.readouterr().out
        words = ("--words", "--model", "fake", "--requests", 2, "--input", 9, "--output", 3)
        assert call("bench-serve", url, *words, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["generated_tokens_per_second"] == pytest.approx(6 / told["seconds"])
        texts = [request for request in server.engine.requests if not request.ignore_eos]
        assert len(texts) == 2
        read = sum(len(request.prompt) for request in texts)
        assert told["prompt_tokens_per_second"] == pytest.approx(read / told["seconds"])


def test_errors_are_counted(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = serve(FakeEngine(failing=True), keys=[b"key"])
    with running(server) as client:
        url = str(client.base_url)
        with pytest.raises(UserError, match=r"/v1/models answers 401 \(The API key is missing"):
            measure_server(ServerUnderLoad(url), RequestLoad(requests=1))
        with pytest.raises(UserError, match="no request succeeded: 503 The model stopped"):
            measure_server(
                ServerUnderLoad(url, "key"), RequestLoad(requests=3, concurrency=1, prompt_tokens=3)
            )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="does not answer"):
            measure_server(ServerUnderLoad(f"127.0.0.1:{free.getsockname()[1]}"), RequestLoad())
    with pytest.raises(UserError, match="is no server's URL"):
        ServerUnderLoad("ftp://x")
