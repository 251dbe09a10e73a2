"""Speed of a server as its clients see it: `moe-jax bench-serve URL`.

    figures = measure_server("http://127.0.0.1:8000", RequestLoad(requests=200, concurrency=16))

Prompts are of random tokens, so no two begin alike, and each answer goes on to its last token. Any
server will do that has vLLM's /tokenize and OpenAI's /v1/completions with `ignore_eos`. Others get
prompts of random words, of about a token each. A thread is a client with a connection for each
request; nothing but the standard library is needed.
"""

from __future__ import annotations

import http.client
import json
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from moe_jax.errors import UserError

QUANTILES = (50, 90, 99)
_SAMPLE = "The quick brown fox jumps over 13 lazy dogs; who can tell why? Ångström, naïve, 東京. "
_WORDS = (
    "time person year way day thing man world life hand part child eye woman place work week case "
    "point company number group problem fact be have do say get make go know take see come think "
    "look want give use find tell ask seem feel try leave call good new first last long great "
    "little own other old right big high small large next early young few public bad same able"
)
_SECONDS = 600.0  # without a byte of an answer


@dataclass(frozen=True)
class RequestLoad:
    """What a server is asked for."""

    requests: int = 200
    concurrency: int = 16
    """Requests that are open at a time."""
    prompt_tokens: int = 512
    answer_tokens: int = 128
    rate: float | None = None
    """Requests per second, at random times (a Poisson process); None: as fast as answers come."""
    seed: int = 0
    words: bool = False
    """Prompts are text, of so many words; an answer may end before its last token."""
    model: str | None = None
    """Its name, where the server does not list it."""


@dataclass
class RequestOutcome:
    """One request: when what came, in seconds after it was sent."""

    began: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """Of each event with text."""
    seconds: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    error: str | None = None


class ServerUnderLoad:
    """A server to send requests to."""

    def __init__(self, url: str, key: str | None = None):
        """Raises UserError for what is no URL."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url} is no server's URL: write it as http://127.0.0.1:8000.")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"

    def send(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """The response, whose body is still to be read. Raises OSError or HTTPException."""
        return self.open(method, path, body).getresponse()

    def open(self, method: str, path: str, body: Any = None) -> http.client.HTTPConnection:
        """A connection over which a request has been sent."""
        kind: Any = http.client.HTTPConnection
        rest: dict[str, Any] = {}
        if self._secure:
            kind, rest = http.client.HTTPSConnection, {"context": ssl.create_default_context()}
        connection = kind(self._host, self._port, timeout=_SECONDS, **rest)
        content = None if body is None else json.dumps(body).encode()
        connection.request(method, self._path + path, content, self._headers)
        return connection

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer. Raises UserError where there is none."""
        try:
            response = self.send(method, path, body)
            content = response.read()
            told = json.loads(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(
                f"{self.url}{path} does not answer ({error or type(error).__name__}): is the "
                f"server there, and ready?"
            ) from error
        if response.status != 200:
            raise UserError(
                f"{self.url}{path} answers {response.status} ({_message(told)}): is the key right "
                f"(--api-key-file)?"
            )
        return told


def measure_server(
    target: ServerUnderLoad, load: RequestLoad, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Percentiles and rates over all requests; `progress` hears how many are done.

    Returns: `first_token_seconds`, `token_seconds` (between tokens: an answer's time after its
    first one, by the tokens after it) and `request_seconds`, each with percentiles and a mean;
    `generated_tokens_per_second`, `prompt_tokens_per_second` and `requests_per_second` over the
    whole run; `errors` by kind.

    Raises:
      UserError: the server does not answer, or no request succeeded.
    """
    chance = random.Random(load.seed)
    bodies = _bodies(target, load, chance)
    outcomes: list[RequestOutcome] = []
    lock, began = threading.Lock(), time.monotonic()

    def one(body: Mapping[str, Any]) -> None:
        outcome = _request(target, body)
        with lock:
            outcomes.append(outcome)
            progress(len(outcomes))

    with ThreadPoolExecutor(load.concurrency) as threads:
        for body, wait in zip(bodies, _waits(load, chance), strict=False):
            time.sleep(max(0.0, began + wait - time.monotonic()))
            threads.submit(one, body)
    return _figures(load, outcomes, time.monotonic() - began)


def _bodies(
    target: ServerUnderLoad, load: RequestLoad, chance: random.Random
) -> list[dict[str, Any]]:
    """What is sent."""
    model = load.model or target.ask("GET", "/v1/models")["data"][0]["id"]
    body = {
        "model": model,
        "max_tokens": load.answer_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.words:
        texts = (chance.choices(_WORDS.split(), k=load.prompt_tokens) for _ in range(load.requests))
        return [body | {"prompt": " ".join(words)} for words in texts]
    sample = target.ask("POST", "/tokenize", {"model": model, "prompt": _SAMPLE})["tokens"]
    pool = sorted(set(sample))
    prompts = (
        [chance.choice(pool) for _ in range(load.prompt_tokens)] for _ in range(load.requests)
    )
    return [body | {"prompt": prompt, "ignore_eos": True} for prompt in prompts]


def _waits(load: RequestLoad, chance: random.Random) -> Iterator[float]:
    """When each request is sent, in seconds after the first."""
    at = 0.0
    while True:
        yield at
        at += 0.0 if load.rate is None else chance.expovariate(load.rate)


def _request(target: ServerUnderLoad, body: Mapping[str, Any]) -> RequestOutcome:
    outcome = RequestOutcome(began=time.monotonic())
    try:
        response = target.send("POST", "/v1/completions", body)
        if response.status != 200:
            outcome.error = f"{response.status} {_message(_read_json(response.read()))}"
            return outcome
        for event in _events(response):
            if "error" in event:
                outcome.error = _message(event)
                return outcome
            now = time.monotonic() - outcome.began
            if any(choice["text"] for choice in event["choices"]):
                outcome.arrivals.append(now)
            if event.get("usage"):
                outcome.tokens = event["usage"]["completion_tokens"]
                outcome.prompt_tokens = event["usage"]["prompt_tokens"]
    except (OSError, http.client.HTTPException, ValueError) as error:
        outcome.error = type(error).__name__
        return outcome
    outcome.seconds = time.monotonic() - outcome.began
    if not outcome.arrivals or not outcome.tokens:
        outcome.error = "an answer without tokens"
    return outcome


def _events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The events of a stream up to its end, which not every server says. Raises ValueError where it
    breaks off.
    """
    ended = False
    for line in iter(response.readline, b""):
        content = line.removeprefix(b"data:").strip()
        if content == b"[DONE]":
            return
        if content:
            event = json.loads(content)
            ended = ended or any(one.get("finish_reason") for one in event.get("choices", ()))
            yield event
    if not ended:
        raise ValueError("the stream broke off")


def _read_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _message(told: Any) -> str:
    error = told.get("error") if isinstance(told, dict) else None
    return str(error.get("message", error))[:100] if isinstance(error, dict) else str(error)[:100]


def _figures(
    load: RequestLoad, outcomes: Sequence[RequestOutcome], seconds: float
) -> dict[str, Any]:
    good = [outcome for outcome in outcomes if outcome.error is None]
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    if not good:
        raise UserError(f"no request succeeded: {errors.most_common(1)[0][0]}.")
    between = [
        (outcome.seconds - outcome.arrivals[0]) / (outcome.tokens - 1)
        for outcome in good
        if outcome.tokens > 1
    ]
    return {
        "requests": len(good),
        "errors": dict(errors),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "prompt_tokens_per_second": sum(outcome.prompt_tokens for outcome in good) / seconds,
        "generated_tokens_per_second": sum(outcome.tokens for outcome in good) / seconds,
        "first_token_seconds": _spread([outcome.arrivals[0] for outcome in good]),
        "token_seconds": _spread(between),
        "request_seconds": _spread([outcome.seconds for outcome in good]),
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Percentiles (each a value that occurred) and the mean; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    told = {
        f"p{part}": ordered[min(len(ordered) - 1, len(ordered) * part // 100)] for part in QUANTILES
    }
    return {"mean": sum(ordered) / len(ordered), **told, "most": ordered[-1]}
