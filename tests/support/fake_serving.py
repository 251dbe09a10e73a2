"""An engine without a model, for tests of what clients of a server see, and clients of its
application in the same process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2
import numpy as np
import openai

from moe_jax.data.chat_template import ChatTemplate
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.serving.api.app import Api, Limits, create_app
from moe_jax.serving.api.prompts import ServedModel
from moe_jax.serving.api.server import HttpServer, bound_socket
from moe_jax.serving.request import EngineStats, ExpertStats, Finished, Request, Token
from tests.support import fake_model

TOOLS = dataclasses.replace(
    fake_model.TEMPLATE,
    source="{{ messages }} {{ tools }} <tool_call> arguments {{ enable_thinking }}",
)
Say = Callable[[Request], Sequence[int]]


def shout(request: Request) -> list[int]:
    """The last line's question in capitals, whatever the options."""
    text = bytes(request.prompt).removesuffix(b"A:").strip().split(b"\n")[-1]
    return list(text.removeprefix(b"U:").upper())


def saying(text: str) -> Say:
    """An engine that says this to everybody."""
    return lambda request: list(text.encode())


class FakeStream:
    """What an engine gives for a request."""

    queue_seconds, cached_tokens = 0.25, 4

    def __init__(self, events: list[Token | Finished]):
        self.events = events
        self.cancelled = False

    def take(self) -> list[Token | Finished]:
        taken, self.events = self.events, []
        return taken

    def cancel(self) -> None:
        self.cancelled = True


@dataclasses.dataclass
class FakeEngine:
    """Says at once all that it has to say; with `holding` it never ends an answer."""

    say: Say = shout
    end: int = fake_model.END
    holding: bool = False
    failing: bool = False
    stalled: float = 0.0
    step: float = 0.0
    failed: str | None = None
    stopped: bool = False
    requests: list[Request] = dataclasses.field(default_factory=list)
    streams: list[FakeStream] = dataclasses.field(default_factory=list)

    _wakes: list[Callable[[], None]] = dataclasses.field(default_factory=list)

    def notify(self, number: int, event: Token | Finished) -> None:
        """One more event of a stream."""
        self.streams[number].events.append(event)
        self._wakes[number]()

    def submit(self, request: Request, notify: Callable[[], None]) -> FakeStream:
        self.requests.append(request)
        stream = FakeStream(self._events(request))
        self.streams.append(stream)
        self._wakes.append(notify)
        notify()
        return stream

    def _events(self, request: Request) -> list[Token | Finished]:
        events: list[Token | Finished] = []
        for wanted in itertools.chain(self.say(request), itertools.repeat(self.end)):
            token = self._filtered(request, wanted)
            if token == self.end or token in request.stop_token_ids:
                ending = Finished("stop")
                break
            top = ((token, -0.5), (0, -2.0), (1, float("-inf")))[: request.logprobs or 0]
            events.append(Token(token, None if request.logprobs is None else -0.5, top))
            if len(events) == request.max_tokens:
                ending = Finished("length")
                break
        if self.failing:
            ending = Finished("error")
        return events if self.holding else [*events, ending]

    def _filtered(self, request: Request, wanted: int) -> int:
        """The token that is wanted or, where it may not come, the first that may."""
        if request.token_filter is None:
            return wanted
        allowed = request.token_filter.allowed()
        token = wanted if allowed[wanted] else int(np.flatnonzero(allowed)[0])
        request.token_filter.accept(token)
        return token

    def stop(self) -> None:
        self.stopped = True

    def dismiss(self) -> None:
        assert self.stopped

    def stats(self) -> EngineStats:
        counts = np.array([[4, 0, 0, 0], [1, 1, 1, 1]])
        slots, loads = np.array([[0, 1, 2, 3], [0, 2, 1, 3]]), np.array([[4, 0], [2, 2]])
        return EngineStats(
            running=3,
            waiting=1,
            cache_use=0.25,
            stalled_seconds=self.stalled,
            step_seconds=self.step,
            expert_counts=counts,
            experts=ExpertStats(slots, 2, loads, 1.5, 2, 1, 0.25, 0.25),
        )


@dataclasses.dataclass
class Server:
    """The application over a fake engine, and clients of it."""

    engine: FakeEngine
    api: Api
    app: Any
    log: list[str]

    def run(self, talk: Callable[[httpx2.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
        """Whatever `talk(client)` returns, in an event loop of its own."""

        async def talked() -> Any:
            transport = httpx2.ASGITransport(self.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
                return await asyncio.wait_for(talk(client), 60)

        return asyncio.run(talked())

    def post(self, path: str, body: Any = None, **rest: Any) -> httpx2.Response:
        """The response to a body."""
        return self.run(lambda client: client.post(path, json=body, **rest))

    def get(self, path: str, **rest: Any) -> httpx2.Response:
        return self.run(lambda client: client.get(path, **rest))

    def ask(self, use: Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, Any]]) -> Any:
        """Whatever `use(client)` returns, of the client that OpenAI publishes."""

        async def talk(client: httpx2.AsyncClient) -> Any:
            return await use(
                openai.AsyncOpenAI(
                    base_url="http://server/v1", api_key="key", http_client=client, max_retries=0
                )
            )

        return self.run(talk)


def serve(
    engine: FakeEngine | None = None,
    *,
    chat: ChatTemplate | None = fake_model.TEMPLATE,
    limits: Limits | None = None,
    keys: Sequence[bytes] = (),
    context: int = 200,
    ready: bool = True,
    model: ServedModel | None = None,
) -> Server:
    """A server, by default of a model of bytes; what it logs is in `log`."""
    engine = engine or FakeEngine()
    log: list[str] = []
    api = Api(limits or Limits())
    app = create_app(api, keys=keys, log=log.append)
    if ready:
        api.open(model or served_model(chat, context), engine)
    return Server(engine, api, app, log)


def served_model(
    chat: ChatTemplate | None = fake_model.TEMPLATE, context: int = 200
) -> ServedModel:
    tokenizer = dataclasses.replace(load_tokenizer("bytes"), chat=chat)
    return ServedModel("fake", tokenizer, (fake_model.END,), context)


def until(condition: Callable[[], Any]) -> None:
    """Waits for it, a minute at most."""
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


@contextmanager
def running(server: Server) -> Iterator[httpx2.Client]:
    """A client of the application behind a real socket."""
    http = HttpServer(server.app, bound_socket("127.0.0.1", 0))
    http.start()
    try:
        with httpx2.Client(base_url=http.address, timeout=60) as client:
            yield client
    finally:
        http.stop()
    assert not http.is_running
