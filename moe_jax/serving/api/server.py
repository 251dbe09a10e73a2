"""The application behind a socket: uvicorn in a thread of its own, so that the main thread is free
for the model and for signals.

    listener = bound_socket("127.0.0.1", 8000)     # raises UserError where the port is taken
    server = HttpServer(app, listener)
    server.start()                                 # from now on it listens
    ...
    server.stop()
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import uvicorn

from moe_jax.errors import UserError

_START_SECONDS, _STOP_SECONDS = 30.0, 5
_CONNECTIONS = 1024  # open ones, of which most wait


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket with an address, to which nobody can connect yet. Raises UserError where the address
    cannot be had.
    """
    bound: socket.socket | None = None
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        if bound is not None:
            bound.close()
        raise UserError(
            f"--host {host} --port {port} cannot be served ({error.strerror or error}): name "
            f"another port, or an address of this machine."
        ) from error


class HttpServer:
    """uvicorn in a thread."""

    def __init__(self, app: Any, listener: socket.socket):
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        self._server, self._listener = uvicorn.Server(config), listener
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def _run(self) -> None:
        self._server.run(sockets=[self._listener])

    @property
    def address(self) -> str:
        """As a URL has it."""
        host, port = self._listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def is_running(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive() and self._server.started

    def start(self) -> None:
        """Begins to listen. Raises UserError where that fails."""
        self._thread.start()
        ends = time.monotonic() + _START_SECONDS
        while self._thread.is_alive() and not self._server.started and time.monotonic() < ends:
            time.sleep(0.01)
        if not self.is_running:
            raise UserError(f"{self.address} cannot be served: name another port.")

    def stop(self) -> None:
        """Closes all connections, those with an open request after a few seconds."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS + 5)
        self._listener.close()
