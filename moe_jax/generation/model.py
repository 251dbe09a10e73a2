"""A loaded model as people use it from Python: `moe_jax.load`.

model = moe_jax.load("path/to/folder")
model.generate("def fibonacci(n):", max_tokens=50, temperature=0)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError
from moe_jax.generation.arguments import (
    check_max_tokens,
    check_messages,
    check_text,
    stop_strings,
    token_ids,
)
from moe_jax.generation.chat import chat_ids, reply_pieces
from moe_jax.generation.evaluate import Evaluation, evaluate
from moe_jax.generation.generate import Reader
from moe_jax.generation.generate import generate as generate_pieces
from moe_jax.generation.sampling import Sampler
from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.generation.template_options import TemplateOptions
from moe_jax.inference.session import Session, prompt_width
from moe_jax.models.batch import NewTokens

if TYPE_CHECKING:
    from moe_jax.inference.session import LoadedModel

Prompt = str | Sequence[int]  # a text, or its tokens


class TextModel:
    """A model that continues texts, answers conversations and scores texts.

    Options of `generate`, `stream` and `chat`:
      max_tokens: tokens of the text at most.
      temperature: logits are divided by it; 0 always takes the likeliest token.
      top_k, top_p, min_p, repetition_penalty: filters, as in transformers' `generate`.
      seed: the same seed gives the same text.
      stop: a string, or several, that end the text and are not part of it.
    """

    def __init__(self, loaded: LoadedModel, *, of_run: bool = False):
        """`of_run` is for a model of this package's training: its texts begin without a start
        token, and its context slides.
        """
        self._loaded, self._of_run = loaded, of_run
        self._reader = Reader(Session(loaded))

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self._loaded.name

    @property
    def context(self) -> int:
        """Tokens that it was made for."""
        return self._loaded.context

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt, the start token among them where the model wants one."""
        if not isinstance(prompt, str):
            return token_ids("prompt", prompt)
        tokenizer = self._loaded.tokenizer
        return tokenizer.encode(prompt) if self._of_run else tokenizer.encode_prompt(prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return self._loaded.tokenizer.decode(token_ids("tokens", tokens))

    @overload
    def generate(self, prompt: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], **options: Any) -> list[str]: ...
    def generate(self, prompt: str | list[str], **options: Any) -> str | list[str]:
        """The text that follows a prompt, or a list of them for a list; the class names the
        options.

        Raises UserError where a prompt is empty or longer than the context.
        """
        if isinstance(prompt, str):
            return "".join(self.stream(prompt, **options))
        if not isinstance(prompt, (list, tuple)):
            check_text("prompt", prompt)
        for one in prompt:
            check_text("prompt", one)
        return ["".join(self.stream(one, **options)) for one in prompt]

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """The same text in pieces, as they come; some are empty."""
        return self._pieces(self.encode(prompt), reply=False, **options)

    def chat(
        self,
        messages: list[dict[str, str]],
        *,
        thinking: bool | None = None,
        template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """The answer to a conversation of `{"role": ..., "content": ...}` messages, without what
        the model thinks before it.

        `thinking` turns that on or off, and `template_kwargs` are variables of the chat template.

        Raises UserError where the tokenizer has no chat template, or the template does not use
        what it is told.
        """
        check_messages(messages)
        template = TemplateOptions(thinking, template_kwargs or {})
        tokens = chat_ids(self._loaded.tokenizer, messages, template)
        return "".join(self._pieces(tokens, reply=True, **options))

    def logits(self, prompt: Any) -> Any:
        """F32 logits [S, V] after each token of a prompt, a text or token ids; a list of such
        arrays for a list of prompts, which the model reads together.

        Raises UserError for an empty prompt, or one that the model cannot read.
        """
        ids = not isinstance(prompt, str) and len(prompt) and not isinstance(prompt[0], str)
        if isinstance(prompt, str) or (ids and np.ndim(prompt[0]) == 0):
            return self.logits([prompt])[0]
        rows = [self.encode(one) for one in prompt]
        if not rows or not all(rows):
            raise UserError("logits: a prompt is empty: give at least one token.")
        longest = max(map(len, rows))
        if longest > self.context:
            raise UserError(
                f"logits: a prompt has {longest} tokens and the model's context {self.context}: "
                f"shorten it."
            )
        return _all_logits(self._loaded, rows)

    def score(self, text: str) -> Evaluation:
        """How well the model predicts a text: nats per token, perplexity, bits per byte."""
        check_text("text", text)
        return evaluate(self._loaded, text, special=not self._of_run)

    def _pieces(
        self,
        tokens: list[int],
        *,
        reply: bool,
        max_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        options = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        sampler = Sampler([options], self._loaded.tokenizer.num_ids)
        check_max_tokens(max_tokens)
        limits: dict[str, Any] = {"max_tokens": max_tokens, "slide": self._of_run}
        limits["stop"] = stop_strings(stop)
        speak = reply_pieces if reply else generate_pieces
        return speak(self._loaded, self._reader, tokens, sampler, **limits)


def _all_logits(loaded: LoadedModel, rows: list[list[int]]) -> list[np.ndarray]:
    """F32 logits [S, V] at every position of each row."""
    plan = loaded.engine.plan
    plan.check_tokens(max(map(max, rows)))
    data = plan.mesh.shape["data"]
    batch, width = -(-len(rows) // data) * data, prompt_width(max(map(len, rows)))
    tokens_BS, length_B = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
    for number, row in enumerate(rows):
        tokens_BS[number, : len(row)], length_B[number] = row, len(row)
    start_B = np.zeros(batch, np.int32)
    new = NewTokens(jnp.asarray(tokens_BS), jnp.asarray(start_B), jnp.asarray(length_B))
    logits_BSV = np.asarray(loaded.engine.all_logits(new))
    return [logits_BSV[number, : len(row)] for number, row in enumerate(rows)]
