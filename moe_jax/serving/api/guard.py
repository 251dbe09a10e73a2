"""What every request passes first: the key, the size of its body, and a line in the log that says
how it ended, without its text.
"""

from __future__ import annotations

import asyncio
import hmac
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Response
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from moe_jax.serving.api.errors import ApiError

OPEN_ROUTES = ("/health",)
BODY_SECONDS = 60.0  # in which a body must have come
_DRAINED = 8  # times the limit that a refused body is read, so that its client hears the answer


def error_response(error: ApiError) -> Response:
    """The response that tells a client of an error."""
    return Response(
        to_json(error.envelope()),
        status_code=error.status,
        media_type="application/json",
        headers=error.headers,
    )


def server_error() -> ApiError:
    """What a client hears of a mistake of the server's."""
    return ApiError(500, "The server failed on this request.", code="server_error")


def report(error: Exception) -> None:
    """Tells stderr where an exception came from, without its own words, which may quote the
    request.
    """
    frames = "".join(traceback.format_tb(error.__traceback__))
    print(f"moe-jax: {type(error).__name__} in a request:\n{frames}", file=sys.stderr)


class Guard:
    """The outermost layer, as ASGI calls it."""

    def __init__(
        self,
        app: Any,
        *,
        keys: Sequence[bytes],
        max_body: int,
        log: Callable[[str], None],
        refused: Callable[[int], None],
    ):
        """
        Args:
          keys: of which a request must have one; none are needed where there are none.
          max_body: bytes of a body.
          log: writes a line.
          refused: is told the status of each request that got no answer.
        """
        self._app, self._keys, self._max_body = app, keys, max_body
        self._log, self._refused = log, refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        scope["told"] = {}  # what the routes add to the line in the log

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_key(scope)
            await self._check_length(scope, receive)
            await self._app(scope, self._measured(receive), noting)
        except ApiError as error:
            await error_response(error)(scope, receive, noting)
        except ClientDisconnect:  # before its body was whole
            status = 499
        except Exception as error:
            report(error)
            if not status:
                await error_response(server_error())(scope, receive, noting)
        if status >= 400:
            self._refused(status)
        if scope["path"] not in OPEN_ROUTES:
            told = "".join(f", {text}" for text in scope["told"].values())
            seconds = time.monotonic() - began
            path = ascii(scope["path"][:80])[1:-1]
            self._log(f"{scope['method']} {path} {status}, {seconds:.2f} s{told}")

    def _check_key(self, scope: Any) -> None:
        if not self._keys or scope["path"] in OPEN_ROUTES:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # All of them, so that the time says nothing.
        fits = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(fits):
            raise ApiError(
                401,
                "The API key is missing or not one of this server's: send it as "
                "'Authorization: Bearer KEY'.",
                code="invalid_api_key",
            )

    async def _check_length(self, scope: Any, receive: Any) -> None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) <= self._max_body:
            return
        read, more = 0, True
        while more and read < _DRAINED * self._max_body:
            message = await receive()
            more = message.get("more_body", False)
            read += len(message.get("body", b""))
        raise self._too_large()

    def _measured(self, receive: Any) -> Any:
        """`receive` that refuses a body which is longer than it may be, or slow to come."""
        read, whole = 0, False

        async def measured() -> Any:
            nonlocal read, whole
            if whole:  # a wait for the client to go away
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except TimeoutError:
                raise ApiError(
                    408, f"The body did not come within {BODY_SECONDS:g} s.", code="timeout"
                ) from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > self._max_body:
                raise self._too_large()
            return message

        return measured

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than this server's limit of {self._max_body:,} bytes.",
            code="request_too_large",
        )
