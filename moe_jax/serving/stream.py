"""What comes of one request: filled by the engine's thread, read by another."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from moe_jax.serving.request import Finished, Token


class TokenStream:
    """Tokens, and `Finished` at the end.

    Read it by `take`, which never waits, or by iterating, which does.
    """

    def __init__(self, notify: Callable[[], None] | None, wake: Callable[[], None]):
        """`notify` is called, on the engine's thread, where there is news; `wake` tells the engine
        of a cancellation.
        """
        self.cancelled = False
        self.queue_seconds: float | None = None
        """From the request's arrival until its prompt was begun."""
        self.cached_tokens = 0
        """Of the prompt: those that the prefix cache had."""
        self._notify, self._wake = notify, wake
        self._events: deque[Token | Finished] = deque()
        self._news = threading.Condition()

    def take(self) -> list[Token | Finished]:
        """What has come since the last call; nothing after `Finished`."""
        with self._news:
            events = list(self._events)
            self._events.clear()
        return events

    def __iter__(self) -> Iterator[Token | Finished]:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._events)
            for event in self.take():
                yield event
                if isinstance(event, Finished):
                    return

    def cancel(self) -> None:
        """Nobody wants the rest: the engine gives up its slot within a step."""
        self.cancelled = True
        self._wake()

    def put(self, *events: Token | Finished) -> None:
        """Adds events; for the engine."""
        with self._news:
            self._events.extend(events)
            self._news.notify_all()
        if self._notify is None:
            return
        try:
            self._notify()
        except RuntimeError:  # an event loop that is closed: nobody listens any more
            self.cancelled = True
