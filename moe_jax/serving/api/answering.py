"""The answers to one request, as the engine makes them: tokens of all its streams in, pieces of
text out.

    job = AnswerJob(choices, engine.submit, metrics, seconds=600)
    async for step in job.steps():        # Step: of one answer
        ...

However a job ends (its answers are there, a stop string, the time limit, a client that went away),
no stream of it goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moe_jax.serving.api.errors import ApiError
from moe_jax.serving.api.metrics import ServerMetrics
from moe_jax.serving.api.replies import Piece, Reply
from moe_jax.serving.request import Finished, Request, Token

# What OpenAI calls the ends of an answer.
_REASONS = {"stop": "stop", "length": "length"}


@dataclass
class Choice:
    """One answer of a request: what the engine is asked for and what has come of it."""

    index: int
    request: Request
    reply: Reply
    tokens: int = 0
    """So far, the end token left out."""
    finish: str | None = None
    newest: float | None = None
    stream: Any = None

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, those that were not computed."""
        return 0 if self.stream is None else self.stream.cached_tokens


class Step(NamedTuple):
    """What is new of one answer."""

    choice: Choice
    pieces: list[Piece]
    tokens: list[Token]
    """Those that came, for their log-probabilities."""
    finish: str | None
    """Why the answer has ended, if it has: `stop`, `length` or `tool_calls`."""


@dataclass
class AnswerJob:
    """All answers to one request."""

    choices: Sequence[Choice]
    submit: Callable[[Request, Callable[[], None]], Any]
    """Hands a request to the engine; the second argument is called where its stream has news, from
    any thread.
    """
    metrics: ServerMetrics
    seconds: float
    """The time that the request may take."""
    began: float = field(default_factory=time.monotonic)

    def seconds_so_far(self) -> float:
        """Since the request came."""
        return time.monotonic() - self.began

    async def steps(self) -> AsyncIterator[Step]:
        """What comes of all answers, as it comes.

        Raises ApiError: status 504 where the time is over, 503 where the engine fails.
        """
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(news.set)

        try:
            for choice in self.choices:
                choice.stream = self.submit(choice.request, wake)
            open_choices = list(self.choices)
            while open_choices:
                await self._wait(news)
                news.clear()
                for choice in open_choices:
                    if events := choice.stream.take():
                        yield self._step(choice, events)
                open_choices = [choice for choice in open_choices if choice.finish is None]
        finally:
            for choice in self.choices:
                if choice.stream is not None and choice.finish is None:
                    choice.stream.cancel()

    async def _wait(self, news: asyncio.Event) -> None:
        left = self.began + self.seconds - time.monotonic()
        try:
            await asyncio.wait_for(news.wait(), max(left, 0.001))
        except TimeoutError:
            raise ApiError(
                504,
                f"The request took longer than {self.seconds:g} s, which is this server's limit: "
                f"ask for fewer tokens.",
                code="timeout",
            ) from None

    def _step(self, choice: Choice, events: Sequence[Token | Finished]) -> Step:
        pieces: list[Piece] = []
        tokens: list[Token] = []
        for event in events:
            if isinstance(event, Finished):
                self._end(choice, event, pieces)
                break
            self._count(choice)
            tokens.append(event)
            pieces += choice.reply.push(event.id)
            if choice.reply.stopped:
                choice.stream.cancel()
                self._end(choice, None, pieces)
                break
        return Step(choice, pieces, tokens, choice.finish)

    def _count(self, choice: Choice) -> None:
        now = time.monotonic()
        choice.tokens += 1
        if choice.newest is None:
            self.metrics.first_token(now - self.began)
            if choice.stream.queue_seconds is not None:
                self.metrics.queued(choice.stream.queue_seconds)
        else:
            self.metrics.next_token(now - choice.newest)
        choice.newest = now

    def _end(self, choice: Choice, finished: Finished | None, pieces: list[Piece]) -> None:
        reason = "stop" if finished is None else _REASONS.get(finished.reason)
        if reason is None:
            assert finished is not None
            choice.finish = finished.reason
            raise ApiError(
                503,
                f"The model stopped working on this request ({finished.reason}): send it again.",
                code="engine_failed",
                retry_after=1,
            )
        pieces += choice.reply.finish()
        choice.finish = "tool_calls" if choice.reply.called and reason == "stop" else reason
        prompt = len(choice.request.prompt)
        self.metrics.finished(choice.finish, prompt, self.seconds_so_far())
