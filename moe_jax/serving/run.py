"""A server's life: refuse what is wrong, listen, load, answer, drain.

    run_server(api, app, listener, open_model)      # returns after SIGTERM or Ctrl-C

The server listens as soon as nothing can be refused any more, and says on /health that it loads.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax.runtime.signals import noted_signals
from moe_jax.serving.api.app import Api
from moe_jax.serving.api.prompts import ServedModel
from moe_jax.serving.api.server import HttpServer
from moe_jax.utils.progress import say

DRAIN_SECONDS = 25.0  # schedulers kill a process some 30 s after they have asked it to end
_LOOK_SECONDS = 1.0  # between looks at whether all is well


class OpenedModel(NamedTuple):
    """A model that is ready to answer."""

    model: ServedModel
    engine: Any
    held: str
    """What is where, as a remark."""


def run_server(
    api: Api,
    app: Any,
    listener: socket.socket,
    open_model: Callable[[Callable[[], None]], OpenedModel],
) -> None:
    """Serves until SIGTERM or Ctrl-C, then answers what is open, for `DRAIN_SECONDS` at most.

    Args:
      open_model: loads a model, and calls its argument when the options, the folder and the memory
        have been found to be good; until then nothing listens.

    Raises:
      UserError: what `open_model` refuses.
      SystemExit: with code 1 where the engine fails, with 0 for a signal while it loads.
    """
    stop, server = threading.Event(), HttpServer(app, listener)

    def asked() -> None:
        stop.set()
        if api.state == "loading":  # nothing is open
            raise SystemExit(0)

    engine: Any = None
    with noted_signals(signal.SIGTERM, signal.SIGINT, at_once=asked):
        try:
            opened = open_model(server.start)
            engine = opened.engine
            api.open(opened.model, engine)
            say(opened.held)
            say(f"ready: {opened.model.name} at {server.address}/v1; SIGTERM or Ctrl-C ends it")
            while not stop.wait(_LOOK_SECONDS):
                _check(server, engine)
            api.drain()
            _drain(api)
        finally:
            if engine is not None:
                engine.stop()
                engine.dismiss()
            server.stop()


def _check(server: HttpServer, engine: Any) -> None:
    """Ends the process with exit code 1, which asks for a restart, where it answers no more."""
    broken = engine.failed
    if broken is None and not server.is_running:
        broken = "the HTTP server ended"
    if broken is not None:
        say(f"moe-jax: {broken}: start the server again.")
        raise SystemExit(1)


def _drain(api: Api) -> None:
    """Waits for the answers that are open."""
    if api.open_answers:
        say(f"{api.open_answers} answers are open: they have {DRAIN_SECONDS:g} s.")
    ends = time.monotonic() + DRAIN_SECONDS
    while api.open_answers and time.monotonic() < ends:
        time.sleep(0.05)
    if api.open_answers:
        say(f"{api.open_answers} answers are broken off.")
