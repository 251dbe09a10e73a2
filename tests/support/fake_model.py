"""A model with the interface of the engine and no arithmetic, for tests of what is typed and
seen.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from moe_jax.data.chat_template import ChatTemplate, Messages
from moe_jax.data.tokenizer import Tokenizer, load_tokenizer
from moe_jax.errors import UserError
from moe_jax.inference import load, session
from moe_jax.models.serving_plan import ServingPlan

VOCABULARY = 264
END = 256


def render(messages: Messages, opened: bool, variables: Mapping[str, Any]) -> str:
    """A chat template: `U:hello`, `A:` and so on, a line each. It knows no other roles."""
    letters = {"system": "S", "user": "U", "assistant": "A"}
    if any(message["role"] not in letters for message in messages):
        raise UserError("The chat template refuses these messages.")
    lines = (f"{letters[message['role']]}:{message['content']}\n" for message in messages)
    return "".join(lines) + variables.get("reply", "A:") * opened


TEMPLATE = ChatTemplate(
    given="tokenizer='fake'",
    source="{{ messages }} {{ reply }} {{ enable_thinking }}",
    render=render,
    encode=lambda text: (list(text.encode()), None),
    tokens={},
)


def shout(tokens: Sequence[int]) -> int:
    """The next token of a reply that is the last question in capitals, and the end after as
    many, whatever was drawn.
    """
    lines = bytes(tokens).split(b"\n")
    question, said = lines[-2].removeprefix(b"U:"), lines[-1].removeprefix(b"A:")
    return [*question.upper(), END][min(len(said), len(question))]


def script(tokens: Sequence[int], prompt: int) -> Callable[[Sequence[int]], int]:
    """Says given tokens after a prompt of `prompt` tokens."""
    return lambda read: tokens[len(read) - prompt]


@dataclasses.dataclass
class Loaded:
    """What `open_model` gives; `speak` is the whole model: tokens so far to the next one."""

    speak: Callable[[Sequence[int]], int]
    context: int = 200
    tokenizer: Tokenizer = dataclasses.field(
        default_factory=lambda: dataclasses.replace(load_tokenizer("bytes"), chat=TEMPLATE)
    )
    eos_ids: tuple[int, ...] = (END,)
    name: str = "fake"
    held_in: str = "float32"
    engine: Any = None
    feeds: list[list[int]] = dataclasses.field(default_factory=list)
    """What was fed, in order."""

    def session(self, batch: int = 1) -> Session:
        return Session(self, batch)


def fake_engine(
    score: Callable[..., tuple[Any, Any]] | None = None,
    decode_bytes: Callable[[int], int] = lambda batch: 10**6,
) -> Any:
    """What evaluation and benchmarks ask of an engine on one device that holds all experts."""
    mesh = types.SimpleNamespace(size=1, shape={"data": 1})
    plan: Any = types.SimpleNamespace(mesh=mesh, decode_bytes=decode_bytes, vocab_size=VOCABULARY)
    plan.check_tokens = lambda largest: ServingPlan.check_tokens(plan, largest)
    return types.SimpleNamespace(plan=plan, score=score, expert_counts=None)


class Session:
    """Rows of tokens; logits of 9 for the token that the model says, and 0 for all others."""

    def __init__(self, loaded: Loaded, batch: int = 1):
        self.loaded = loaded
        self.rows: list[list[int]] = [[] for _ in range(batch)]

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def feed(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        logits = np.zeros((len(self.rows), VOCABULARY), np.float32)
        for row, more, out in zip(self.rows, tokens, logits, strict=True):
            assert len(more) > 0
            row += more
            assert len(row) <= self.loaded.context
            self.loaded.feeds.append(list(more))
            out[self.loaded.speak(row)] = 9.0
        return logits

    def rewind(self, row: int, length: int) -> None:
        assert length <= len(self.rows[row])
        del self.rows[row][length:]


def install(monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> list[dict[str, Any]]:
    """Puts the fake in the engine's place; returns what each `open_model` was given."""
    opened: list[dict[str, Any]] = []

    def open_model(path: Any, **options: Any) -> Loaded:
        opened.append({"path": path, **options})
        return loaded

    monkeypatch.setattr(load, "open_model", open_model)
    for module in (load, session):
        monkeypatch.setattr(module, "Session", Session)
    return opened
