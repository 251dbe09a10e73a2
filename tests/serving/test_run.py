"""From the start of a server to its end, without a model."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from moe_jax.errors import UserError
from moe_jax.serving.api.server import bound_socket
from moe_jax.serving.request import Finished
from moe_jax.serving.run import OpenedModel, run_server
from tests.support.fake_serving import FakeEngine, Server, saying, serve, served_model, until


def start(server: Server, open_model: Callable[[Callable[[], None]], OpenedModel]) -> None:
    with bound_socket("127.0.0.1", 0) as listener:
        run_server(server.api, server.app, listener, open_model)


def test_a_server_loads_answers_and_drains(capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(FakeEngine(saying("one"), holding=True), ready=False)
    listener = bound_socket("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    seen: dict[str, Any] = {}

    def open_model(checked: Callable[[], None]) -> OpenedModel:
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/health")
        checked()
        seen["loading"] = httpx2.get(f"{url}/health").json()
        return OpenedModel(served_model(), server.engine, "float32 on a device")

    def talk() -> None:
        until(lambda: server.api.state == "ready")
        with httpx2.Client(base_url=url, timeout=60) as client:
            body = {"model": "fake", "prompt": "x", "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = (line for line in response.iter_lines() if line)
                next(lines)
                os.kill(os.getpid(), signal.SIGTERM)
                until(lambda: server.api.state == "draining")
                seen["late"] = httpx2.post(f"{url}/v1/completions", json=body).status_code
                server.engine.notify(0, Finished("stop"))
                seen["last"] = list(lines)[-1]

    talking = threading.Thread(target=talk)
    talking.start()
    run_server(server.api, server.app, listener, open_model)
    talking.join()
    assert seen == {"loading": {"status": "loading"}, "late": 503, "last": "data: [DONE]"}
    assert server.engine.stopped
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")
    said = capsys.readouterr().err
    assert "float32 on a device" in said and f"ready: fake at {url}/v1" in said


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(ready=False)

    def refuse(checked: Callable[[], None]) -> OpenedModel:
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        start(server, refuse)

    def fail(checked: Callable[[], None]) -> OpenedModel:
        checked()
        server.engine.failed = "its device is gone"
        return OpenedModel(served_model(), server.engine, "")

    with pytest.raises(SystemExit) as ended:
        start(server, fail)
    assert ended.value.code == 1 and "its device is gone" in capsys.readouterr().err


def test_sigterm_ends_a_server_that_loads() -> None:
    def open_model(checked: Callable[[], None]) -> OpenedModel:
        checked()
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal ends it")

    with pytest.raises(SystemExit) as ended:
        start(serve(ready=False), open_model)
    assert ended.value.code == 0
