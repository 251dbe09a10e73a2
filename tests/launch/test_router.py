"""One address for several servers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx2
import pytest

from moe_jax.launch import router as router_module
from moe_jax.launch.router import Replica, ServerRouter, create_router
from moe_jax.serving.api.app import Limits
from moe_jax.serving.api.server import HttpServer, bound_socket
from tests.support.fake_serving import FakeEngine, running, saying, serve, until

BODY = {"model": "fake", "prompt": "x"}


@contextmanager
def routed(
    *urls: str, keys: tuple[bytes, ...] = ()
) -> Iterator[tuple[ServerRouter, httpx2.Client]]:
    """A router over these servers, and a client of it."""
    router = ServerRouter([Replica(url) for url in urls])
    app = create_router(router, keys=keys, max_body=10_000, log=lambda line: None)
    http = HttpServer(app, bound_socket("127.0.0.1", 0))
    http.start()
    try:
        with httpx2.Client(base_url=http.address, timeout=60) as client:
            yield router, client
    finally:
        http.stop()


def said(client: httpx2.Client) -> str:
    return str(client.post("/v1/completions", json=BODY).json()["choices"][0]["text"])


@pytest.fixture(autouse=True)
def always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "LOOK_SECONDS", -1.0)


def test_requests_go_to_those_that_answer() -> None:
    servers = [serve(FakeEngine(saying(text))) for text in ("one", "two")]
    with ExitStack() as stack:
        urls = [
            str(stack.enter_context(running(server)).base_url).rstrip("/") for server in servers
        ]
        with routed(*urls) as (router, client):
            assert [said(client) for _ in range(4)] == ["one", "two", "one", "two"]
            assert client.get("/health").json()["status"] == "ready"
            assert client.get("/v1/models").json()["data"][0]["id"] == "fake"
            refused = client.post("/v1/completions", json=BODY | {"best_of": 3})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "best_of"
            stream = client.post("/v1/completions", json=BODY | {"stream": True})
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert stream.text.endswith("data: [DONE]\n\n")
            servers[0].api.drain()  # as a server that is to be updated does
            assert {said(client) for _ in range(3)} == {"two"}
            told = client.get("/health").json()
            assert told["status"] == "degraded" and told["reasons"] == ["replica_lost"]
            assert [one["status"] for one in told["replicas"]] == ["draining", "ready"]
            servers[0].api.state = "ready"
            assert {said(client) for _ in range(4)} == {"one", "two"}
            router.draining = True
            assert client.post("/v1/completions", json=BODY).json()["error"]["code"] == "draining"
            assert client.get("/health").json()["status"] == "draining"
            router.draining = False
            stack.close()
            assert client.get("/health").status_code == 503
            response = client.post("/v1/completions", json=BODY)
            assert response.status_code == 503 and response.headers["retry-after"]
            assert all(one.open == 0 for one in router.replicas)


def test_a_full_replica_is_passed_over_and_one_that_leaves_between_looks() -> None:
    full = serve(limits=Limits(max_batch=1, max_waiting=0))
    full.api.open_answers = 1
    with running(full) as first, running(serve(FakeEngine(saying("two")))) as second:
        urls = [str(one.base_url).rstrip("/") for one in (first, second)]
        with routed(*urls) as (_, client):
            assert {said(client) for _ in range(3)} == {"two"}
        with routed(urls[0]) as (_, client):
            response = client.post("/v1/completions", json=BODY)
            assert response.status_code == 429 and response.headers["retry-after"]
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            gone = Replica(f"http://127.0.0.1:{nobody.getsockname()[1]}", "ready", True)
            router = ServerRouter([gone, Replica(urls[1], "ready", True)])
            for one in router.replicas:
                one.looked = float("inf")
            http = HttpServer(
                create_router(router, max_body=10_000, log=lambda line: None),
                bound_socket("127.0.0.1", 0),
            )
            http.start()
            with httpx2.Client(base_url=http.address, timeout=60) as client:
                assert said(client) == "two" and gone.status == "lost"
            http.stop()


def test_a_client_that_leaves_cancels_and_keys_are_passed_on() -> None:
    server = serve(FakeEngine(holding=True), keys=[b"secret"])
    with running(server) as one, routed(str(one.base_url).rstrip("/")) as (router, client):
        assert client.post("/v1/completions", json=BODY).status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            lines = response.iter_lines()  # the stream is closed where this one ends
            next(lines)
            assert router.replicas[0].open == 1
        until(lambda: server.engine.streams[-1].cancelled and not router.replicas[0].open)
        with pytest.raises(httpx2.ReadTimeout):  # a whole answer, which never comes
            client.post("/v1/completions", json=BODY, timeout=0.3)
        until(lambda: len(server.engine.streams) == 2 and server.engine.streams[-1].cancelled)
        until(lambda: not router.replicas[0].open)
    with routed("http://127.0.0.1:1", keys=(b"mine",)) as (_, client):
        assert client.get("/v1/models").status_code == 401
        assert client.get("/health").status_code == 503


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
def test_a_replica_that_dies_meanwhile_is_told_of(kind: str) -> None:
    listener = bound_socket("127.0.0.1", 0)
    listener.listen()

    def half_an_answer() -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            asked = connection.recv(10_000)
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: %s\r\n\r\n"
            content = b'{"status": "ready"}' if b"/health" in asked else b"data: {}\n\n"
            connection.sendall(head % kind.encode() + b"%x\r\n%s\r\n" % (len(content), content))
            if b"/health" in asked:
                connection.sendall(b"0\r\n\r\n")
            connection.close()

    thread = threading.Thread(target=half_an_answer)
    thread.start()
    with routed(f"http://127.0.0.1:{listener.getsockname()[1]}") as (router, client):
        response = client.post("/v1/completions", json=BODY)
        thread.join()
        if kind == "application/json":
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "replica_lost"
        else:
            assert response.status_code == 200 and "replica_lost" in response.text
        assert router.replicas[0].open == 0
    listener.close()
