"""The routes. An `Api` holds what they share: the model, the engine, and how many answers are open.

api = Api(limits)
app = create_app(api)          # answers /health at once, with 503
api.open(model, engine)        # from now on all routes
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from moe_jax import __version__
from moe_jax.serving.api.answering import AnswerJob, Step
from moe_jax.serving.api.bodies import read_body
from moe_jax.serving.api.errors import ApiError
from moe_jax.serving.api.fields import CHAT, COMPLETION, DETOKENIZE, TOKENIZE, ApiTable, schemas
from moe_jax.serving.api.guard import Guard, error_response, report, server_error
from moe_jax.serving.api.metrics import ServerMetrics
from moe_jax.serving.api.plans import Plan, chat_plan, completion_plan
from moe_jax.serving.api.prompts import ServedModel
from moe_jax.serving.api.shapes import usage


@dataclass(frozen=True)
class Limits:
    """What a server takes at most."""

    max_batch: int = 32
    """Answers that are generated at a time."""
    max_waiting: int = 128
    """Answers that wait for their turn."""
    max_body: int = 4 * 2**20
    """Bytes of a request's body."""
    request_seconds: float = 600.0
    """Time of a request, waiting included."""
    wedged_seconds: float = 60.0
    """After so long without a step, while requests wait, the server says that it is wedged."""
    slow_seconds: float = 5.0
    """A step that takes so long makes it say that it is degraded."""


class Api:
    """What the routes share. All but `open`, `drain` and `open_answers` belongs to the event loop
    of the server.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.state = "loading"
        """`loading`, `ready` or `draining`."""
        self.open_answers = 0
        self.model: ServedModel | None = None
        self.metrics: ServerMetrics | None = None
        self._engine: Any = None
        self._seconds = 1.0  # what an answer took of late
        self._plans = anyio.CapacityLimiter(1)  # tokenizers are not made for several threads
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, model: ServedModel, engine: Any) -> None:
        """Begins to answer."""
        self.metrics = ServerMetrics(model.name, engine.stats)
        self.model, self._engine = model, engine
        self.state = "ready"

    def drain(self) -> None:
        """Takes no further request; those that are open go on."""
        self.state = "draining"

    def health(self) -> tuple[int, dict[str, Any]]:
        """(status, body) of /health: 200 only where requests are answered."""
        if self.state != "ready":
            return 503, {"status": self.state}
        if self._engine.failed is not None:
            return 503, {"status": "failed"}
        stats = self._engine.stats()
        stalled = stats.stalled_seconds
        if stalled > self.limits.wedged_seconds:
            return 503, {"status": "wedged", "seconds_without_a_step": round(stalled, 1)}
        reasons = []
        if max(stalled, stats.step_seconds) > self.limits.slow_seconds:
            reasons.append("slow_steps")
        if self.open_answers >= self.limits.max_batch + self.limits.max_waiting:
            reasons.append("queue_full")
        return 200, {"status": "degraded", "reasons": reasons} if reasons else {"status": "ready"}

    def require(self) -> ServedModel:
        """The model. Raises ApiError, status 503, where it is not there yet or no more."""
        if self.state != "ready" or self.model is None:
            raise ApiError(
                503, f"The server is {self.state}: try again.", code=self.state, retry_after=5
            )
        return self.model

    def experts(self) -> dict[str, Any]:
        """How many choices fell on each expert of each layer, where they are, and what moving them
        took.
        """
        model, stats = self.require(), self._engine.stats()
        told: dict[str, Any] = {"object": "expert_load", "model": model.name}
        told["choices"] = _whole_numbers(stats.expert_counts)
        if (experts := stats.experts) is not None:
            told["slots"] = _whole_numbers(experts.slots)
            told["devices"] = experts.ranks
            told["device_choices"] = _whole_numbers(experts.device_choices)
            told["moves"] = {
                "experts": experts.moves,
                "pauses": experts.pauses,
                "seconds": experts.pause_seconds,
                "longest_pause_seconds": experts.longest_pause,
                "max_over_mean_before": experts.before,
            }
        return told

    def refused(self, status: int) -> None:
        """Counts a request that got an error."""
        if self.metrics is not None:
            self.metrics.refused(status)

    async def plan(self, table: ApiTable, make: Callable[..., Any], request: Request) -> Any:
        """What `make(model, body)` makes of a request's body, beside the event loop."""
        content = await request.body()

        def made() -> Any:
            return make(self.require(), read_body(table, content))

        return await anyio.to_thread.run_sync(made, limiter=self._plans)

    async def answer(self, plan: Plan, request: Request) -> Response:
        """The answer to a request, whole or as events."""
        if plan.user is not None:
            request.scope["told"]["user"] = f"user {plan.user[:64]!a}"
        self._admit(len(plan.choices))
        queue: asyncio.Queue[Step | ApiError | None] = asyncio.Queue()
        task = asyncio.create_task(self._run(plan, request, queue))
        self._tasks.add(task)  # the loop itself keeps no task alive
        task.add_done_callback(self._tasks.discard)
        first = await queue.get()
        if isinstance(first, ApiError):
            raise first
        if plan.stream:
            events = self._events(plan, request, queue, first)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        step: Step | ApiError | None = first
        while step is not None:
            if isinstance(step, ApiError):
                raise step
            plan.shape.add(step)
            step = await queue.get()
        if any(choice.finish is None for choice in plan.choices):
            raise ApiError(499, "The client went away.", code="client_closed_request")
        used = self._used(plan, request)
        body = plan.envelope.whole(plan.shape.whole(), used)
        return Response(to_json(body), media_type="application/json")

    def _admit(self, answers: int) -> None:
        """Counts answers in. Raises ApiError, status 429, where too many wait."""
        most = self.limits.max_batch + self.limits.max_waiting
        if answers > most:
            raise ApiError(400, f"A request may ask for {most} answers at most.", param="n")
        if self.open_answers + answers > most:
            turns = (self.open_answers + answers - most) / self.limits.max_batch
            after = math.ceil(min(max(turns * self._seconds, 1), 60))
            raise ApiError(
                429,
                f"The server is full: {self.open_answers} answers are running or waiting. Try "
                f"again in {after} s.",
                code="server_full",
                retry_after=after,
            )
        self.open_answers += answers

    async def _run(
        self, plan: Plan, request: Request, queue: asyncio.Queue[Step | ApiError | None]
    ) -> None:
        """Runs a plan until it is done or its client is gone; its steps go into the queue, then
        None.
        """
        assert self.metrics is not None
        job = AnswerJob(
            plan.choices, self._engine.submit, self.metrics, self.limits.request_seconds
        )

        async def work() -> None:
            try:
                async for step in job.steps():
                    queue.put_nowait(step)
            except ApiError as error:
                queue.put_nowait(error)
            except Exception as error:
                report(error)
                queue.put_nowait(server_error())

        working, gone = asyncio.create_task(work()), asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            working.cancel()
            await asyncio.wait({working})
            self.open_answers -= len(plan.choices)
            self._seconds += 0.2 * (job.seconds_so_far() - self._seconds)
            queue.put_nowait(None)

    async def _events(
        self,
        plan: Plan,
        request: Request,
        queue: asyncio.Queue[Step | ApiError | None],
        first: Step | None,
    ) -> AsyncIterator[bytes]:
        """A request's answer in server-sent events."""
        empty: dict[str, Any] = {"usage": None} if plan.include_usage else {}
        step: Step | ApiError | None = first
        while step is not None:
            if isinstance(step, ApiError):
                yield _event(step.envelope())
                return
            if chunks := plan.shape.chunks(step):
                yield b"".join(_event(plan.envelope.chunk([one], **empty)) for one in chunks)
            step = await queue.get()
        used = self._used(plan, request)
        if plan.include_usage:
            yield _event(plan.envelope.chunk([], usage=used))
        yield b"data: [DONE]\n\n"

    def _used(self, plan: Plan, request: Request) -> dict[str, Any]:
        used = usage(plan.prompt_tokens, plan.choices)
        counts = f"{used['prompt_tokens']} + {used['completion_tokens']} tokens"
        request.scope["told"]["tokens"] = counts
        return used


async def _gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _whole_numbers(matrix: Any) -> list[list[int]] | None:
    return None if matrix is None else [[int(count) for count in row] for row in matrix]


def _event(content: Any) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"


def _json(content: Any, status: int = 200) -> Response:
    return Response(to_json(content), status_code=status, media_type="application/json")


def create_app(api: Api, *, keys: Sequence[bytes] = (), log: Callable[[str], None]) -> FastAPI:
    """The application that uvicorn runs; a request must have one of the keys, if there are any."""
    app = FastAPI(title="moe-jax", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, keys=keys, max_body=api.limits.max_body, log=log, refused=api.refused)
    app.add_exception_handler(HTTPException, _told_route)
    _add_generating(app, api)
    _add_tokens(app, api)
    _add_reading(app, api)
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    return app


async def _told_route(request: Request, error: Any) -> Response:
    place = f"{request.method} {request.url.path[:80]!a}"
    return error_response(ApiError(error.status_code, f"{place}: {error.detail}."))


_ERRORS = {"description": "OpenAI's error envelope; `param` names the field."}


def _route(table: ApiTable) -> dict[str, Any]:
    """What /openapi.json says of a route whose body a table checks."""
    schema = {"$ref": f"#/components/schemas/{table.name}"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"openapi_extra": {"requestBody": body}, "responses": {"4XX": _ERRORS, "5XX": _ERRORS}}


def _add_generating(app: FastAPI, api: Api) -> None:
    @app.post("/v1/chat/completions", **_route(CHAT))
    async def chat_completions(request: Request) -> Response:
        """The reply to a conversation."""
        return await api.answer(await api.plan(CHAT, chat_plan, request), request)

    @app.post("/v1/completions", **_route(COMPLETION))
    async def completions(request: Request) -> Response:
        """The continuation of a text, or of several."""
        return await api.answer(await api.plan(COMPLETION, completion_plan, request), request)


def _add_tokens(app: FastAPI, api: Api) -> None:
    @app.post("/tokenize", **_route(TOKENIZE))
    async def tokenize(request: Request) -> Response:
        """The tokens of a text or of a conversation, as the model would read them."""
        return _json(await api.plan(TOKENIZE, _tokenized, request))

    @app.post("/detokenize", **_route(DETOKENIZE))
    async def detokenize(request: Request) -> Response:
        """The text of tokens."""
        return _json(await api.plan(DETOKENIZE, _detokenized, request))


def _tokenized(model: ServedModel, body: Any) -> dict[str, Any]:
    model.check_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Either prompt or messages must be given.", param="prompt")
    if body.prompt is not None:
        ids = model.text_prompt(body.prompt, body.add_special_tokens)
    else:
        ids = model.chat_prompt(body, tools=body.tools or [])
    told = {"count": len(ids), "max_model_len": model.context, "tokens": ids}
    if body.return_token_strs:
        told["token_strs"] = [model.vocabulary.name_of(token) for token in ids]
    return told


def _detokenized(model: ServedModel, body: Any) -> dict[str, Any]:
    model.check_name(body.model)
    model.check_ids(body.tokens, "tokens")
    return {"prompt": model.tokenizer.decode(body.tokens)}


def _add_reading(app: FastAPI, api: Api) -> None:
    def described(model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "moe-jax",
            "max_model_len": model.context,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model that is served."""
        return _json({"object": "list", "data": [described(api.require())]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """What is known of it."""
        model = api.require()
        model.check_name(name)
        return _json(described(model))

    @app.get("/health")
    async def health() -> Response:
        """200 where requests are answered (`ready`, `degraded`), else 503, and why."""
        status, body = api.health()
        return _json(body, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        text = b"" if api.metrics is None else api.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/experts")
    async def experts() -> Response:
        """How many choices fell on each expert of each layer, and where the experts are."""
        return _json(api.experts())


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema of the routes, with the bodies that the table of fields describes."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {}).update(schemas())
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        app.openapi_schema = schema
    return app.openapi_schema
