"""The application behind a real socket."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from moe_jax.errors import UserError
from moe_jax.serving.api.server import bound_socket
from moe_jax.serving.request import Finished, Token
from tests.support.fake_serving import FakeEngine, running, saying, serve, until

BODY = {"model": "fake", "prompt": "x", "stream": True}


def test_events_come_while_the_text_goes_on_and_a_client_that_leaves_cancels() -> None:
    engine = FakeEngine(saying("one"), holding=True)
    server = serve(engine)
    with running(server) as client:
        with client.stream("POST", "/v1/completions", json=BODY) as response:
            events = (line for line in response.iter_lines() if line)
            assert '"text":"one"' in next(events)
            engine.notify(0, Token(33))
            assert '"text":"!"' in next(events)
            assert not engine.streams[0].cancelled and server.api.open_answers == 1
        until(lambda: engine.streams[0].cancelled and server.api.open_answers == 0)
        answers: list[Any] = []
        body = BODY | {"stream": False}
        asking = threading.Thread(
            target=lambda: answers.append(client.post("/v1/completions", json=body))
        )
        asking.start()
        until(lambda: len(engine.streams) == 2)
        engine.notify(1, Finished("stop"))
        asking.join()
        assert answers[0].json()["choices"][0]["text"] == "one"
        # Larger than the limit: the answer comes before the connection ends.
        refused = client.post("/v1/completions", content=b"x" * 9_000_000)
        assert refused.status_code == 413


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} cannot be served"):
            bound_socket("127.0.0.1", port)
    with pytest.raises(UserError, match="--host nowhere"):
        bound_socket("nowhere.invalid", 0)
