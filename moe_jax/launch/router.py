"""One address for several servers of one model: `moe-jax route URL URL ...`.

    router = ServerRouter([Replica(url) for url in urls])
    app = create_router(router, keys=keys, max_body=..., log=say)

A request goes to the replica with the fewest open ones, of those whose /health is 200. One that
cannot be reached, drains or is full is passed over for the next. What a replica has begun to answer
is not asked again: where it dies, the client hears 503, or in a stream an event with `error`. A
client that goes away takes its request to the replica with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx2
from fastapi import Response
from pydantic_core import to_json

from moe_jax.serving.api.errors import ApiError
from moe_jax.serving.api.guard import Guard

LOOK_SECONDS = 1.0  # for which what a replica's /health said is believed
_REACHED = 2.0  # seconds within which a replica must be reached
_SENT = ("authorization", "content-type", "accept")  # headers, to a replica and back
_RETURNED = ("content-type", "retry-after", "cache-control", "x-accel-buffering")
_ELSEWHERE = (429, 503)  # statuses after which the next replica is asked


@dataclass(eq=False)
class Replica:
    """A server, as the router sees it."""

    url: str
    status: str = "unknown"
    """What its /health says, or `lost`."""
    answers: bool = False
    open: int = 0
    served: int = 0
    looked: float = float("-inf")


class ServerRouter:
    """The replicas, and what is open on each. It belongs to one event loop."""

    def __init__(self, replicas: Sequence[Replica]):
        self.replicas = list(replicas)
        self.draining = False
        """Takes no further request; those that are open go on. Another thread may set it."""

    @property
    def open_requests(self) -> int:
        """On all replicas."""
        return sum(one.open for one in self.replicas)

    @cached_property
    def _client(self) -> httpx2.AsyncClient:
        timeout = httpx2.Timeout(None, connect=_REACHED)
        return httpx2.AsyncClient(timeout=timeout, limits=httpx2.Limits(max_connections=None))

    async def look(self) -> None:
        """Asks the replicas how they are, where that was not done just now."""
        old = [one for one in self.replicas if time.monotonic() > one.looked + LOOK_SECONDS]
        await asyncio.gather(*map(self._look, old))

    async def _look(self, replica: Replica) -> None:
        replica.looked = time.monotonic()
        try:
            response = await self._client.get(f"{replica.url}/health", timeout=_REACHED)
            replica.status, replica.answers = (
                str(response.json()["status"]),
                response.status_code == 200,
            )
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            replica.status, replica.answers = "lost", False

    def health(self) -> tuple[int, dict[str, Any]]:
        """(status, body) of /health: 200 where any replica answers."""
        told = [vars(one) for one in self.replicas]
        told = [{name: one[name] for name in ("url", "status", "open", "served")} for one in told]
        if self.draining or not any(one.answers for one in self.replicas):
            return 503, {"status": "draining" if self.draining else "lost", "replicas": told}
        reasons = [] if all(one.answers for one in self.replicas) else ["replica_lost"]
        if any(one.status == "degraded" for one in self.replicas):
            reasons.append("replica_degraded")
        status = {"status": "degraded", "reasons": reasons} if reasons else {"status": "ready"}
        return 200, status | {"replicas": told}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """An ASGI application: one request."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        await self.look()
        if scope["path"] == "/health":
            status, told = self.health()
            await Response(to_json(told), status, media_type="application/json")(
                scope, receive, send
            )
            return
        if self.draining:
            text = "The server is draining: try again."
            raise ApiError(503, text, code="draining", retry_after=5)
        answering = asyncio.create_task(self._answer(scope, body, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            answering.cancel()  # nothing where it is done
        if answering.done():
            answering.result()
        else:
            await asyncio.wait({answering})

    async def _answer(self, scope: Any, body: bytes, send: Any) -> None:
        """Sends the answer of a replica. Raises ApiError, status 503, where none can be had."""
        tried: list[Replica] = []
        refusal: Response | None = None
        while left := [one for one in self.replicas if one.answers and one not in tried]:
            replica = min(left, key=lambda one: (one.open, one.served))
            tried.append(replica)
            replica.open, replica.served = replica.open + 1, replica.served + 1
            try:
                async with self._client.stream(
                    scope["method"], _target(replica, scope), content=body, headers=_sent(scope)
                ) as answer:
                    if answer.status_code not in _ELSEWHERE:
                        await _pass_on(answer, send)
                        return
                    refusal = Response(await answer.aread(), answer.status_code, _back(answer))
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                replica.status, replica.answers = "lost", False
            except httpx2.HTTPError:  # it may have begun
                replica.status, replica.answers = "lost", False
                raise _lost() from None
            finally:
                replica.open -= 1
        if refusal is None:
            text = "No replica answers: try again."
            raise ApiError(503, text, code="no_replica", retry_after=5)
        await refusal(scope, _nothing, send)


async def _pass_on(answer: httpx2.Response, send: Any) -> None:
    """A replica's answer to the client: a stream as it comes, anything else once it is whole."""
    if "event-stream" not in answer.headers.get("content-type", ""):
        whole = Response(await answer.aread(), answer.status_code, _back(answer))
        await whole({"type": "http"}, _nothing, send)
        return
    headers = [(name.encode(), value.encode()) for name, value in _back(answer).items()]
    await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
    try:
        async for piece in answer.aiter_raw():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except httpx2.HTTPError:
        told = b"data: " + to_json(_lost().envelope()) + b"\n\n"
        await send({"type": "http.response.body", "body": told, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _target(replica: Replica, scope: Any) -> str:
    query = scope["query_string"].decode("latin-1")
    path = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
    return f"{replica.url}{path}{f'?{query}' if query else ''}"


def _sent(scope: Any) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in scope["headers"] if name.decode("latin-1") in _SENT]


def _back(answer: httpx2.Response) -> dict[str, str]:
    return {name: answer.headers[name] for name in _RETURNED if name in answer.headers}


def _lost() -> ApiError:
    text = "The replica that was answering this request is lost: send it again."
    return ApiError(503, text, code="replica_lost", retry_after=1)


async def _gone(receive: Any) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Any:
    return {"type": "http.disconnect"}


def create_router(
    router: ServerRouter, *, keys: Sequence[bytes] = (), max_body: int, log: Callable[[str], None]
) -> Any:
    """The application that uvicorn runs; a request must have one of the keys, if there are any."""
    return Guard(router, keys=keys, max_body=max_body, log=log, refused=lambda status: None)
