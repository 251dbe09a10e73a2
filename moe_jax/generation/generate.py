"""Text from a model, token by token, over the key-value cache of a `Session`.

loaded = open_model("path/to/folder")
reader = Reader(loaded.session())
sampler = Sampler([SamplingOptions()], loaded.tokenizer.num_ids)
prompt = loaded.tokenizer.encode_prompt("def ")
for piece in generate(loaded, reader, prompt, sampler, max_tokens=50):
    print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax

from moe_jax.errors import UserError
from moe_jax.generation.sampling import Sampler
from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.generation.stats import GenerationStats
from moe_jax.generation.streaming import EMPTY_PROMPT, TextStream
from moe_jax.model_io.source import require_run
from moe_jax.profiling.clock import Stopwatch

if TYPE_CHECKING:
    from moe_jax.inference.session import LoadedModel, Session


class Reader:
    """One row of a session and the tokens in it: of a text that begins as the last one did, only
    the rest is read.
    """

    def __init__(self, session: Session):
        self.tokens: list[int] = []
        self._session = session

    def read(self, tokens: Sequence[int]) -> tuple[jax.Array, int]:
        """(f32 logits [1, V] after all of `tokens`, how many of them the cache held); `tokens` are
        not empty.
        """
        # One token is read in any case: only reading gives logits.
        longest = min(len(self.tokens), len(tokens) - 1)
        kept = next((i for i in range(longest) if self.tokens[i] != tokens[i]), longest)
        if kept < len(self.tokens):
            self._session.rewind(0, kept)
            self.tokens = self.tokens[:kept]
        logits_BV = self._session.feed([list(tokens[kept:])])
        self.tokens = list(tokens)
        return logits_BV, kept

    def append(self, token: int) -> jax.Array:
        """F32 logits [1, V] after one more token."""
        logits_BV = self._session.feed([[token]])
        self.tokens.append(token)
        return logits_BV


def generate(
    loaded: LoadedModel,
    reader: Reader,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    figures: GenerationStats | None = None,
    slide: bool = False,
    reply: bool = False,
    marks: Sequence[str] = (),
) -> Generator[str, None, None]:
    """Pieces of the text that follows `prompt`, one per token and sometimes empty, until the model
    or one of the limits ends it.

    Args:
      stop: Strings that end the text and are not part of it.
      figures: Is filled in.
      slide: Where the context is full, read its last half again and go on; of a longer prompt the
        end is read.
      reply: The text stands alone, as a chat's reply does, and does not go on from the prompt's
        last word.
      marks: Special tokens that the text holds; it holds no others.

    Raises:
      UserError: the prompt is empty, or longer than the context (without `slide`), or a stop string
        is empty.
    """
    figures = GenerationStats() if figures is None else figures
    if not prompt:
        raise UserError(EMPTY_PROMPT)
    if not slide:
        check_length(prompt, loaded.context)
    text = TextStream(loaded.tokenizer, stop, after=() if reply else prompt, marks=marks)
    prompt = prompt[-loaded.context :]
    with Stopwatch() as watch:
        sampler.begin(prompt)
        logits_BV, figures.reused_tokens = reader.read(prompt)
        token = int(sampler.draw(logits_BV)[0])
    figures.prompt_tokens, figures.prompt_seconds, figures.compile_seconds = (
        len(prompt),
        watch.seconds,
        watch.compiling,
    )
    while token not in loaded.eos_ids:
        figures.tokens += 1
        yield text.push(token)
        if ended := _limit(
            figures, text, max_tokens, full=len(reader.tokens) >= loaded.context and not slide
        ):
            figures.ended = ended
            break
        with Stopwatch() as watch:
            token = int(sampler.draw(_next_logits(reader, token, loaded.context))[0])
        figures.steps += 1
        figures.step_seconds += watch.seconds
        figures.compile_seconds += watch.compiling
    else:
        figures.ended = "end"
    yield text.finish()


def check_length(prompt: Sequence[int], context: int) -> None:
    """Raises UserError for a prompt that the context has no room for."""
    if len(prompt) > context:
        raise UserError(
            f"The prompt has {len(prompt)} tokens and the model's context {context}: shorten it, "
            f"or raise --context."
        )


def _limit(
    figures: GenerationStats, text: TextStream, max_tokens: int, full: bool
) -> Literal["stop", "tokens", "context"] | None:
    """What ends the text after its newest token, if anything does."""
    if text.stopped:
        return "stop"
    if figures.tokens >= max_tokens:
        return "tokens"
    return "context" if full else None


def _next_logits(reader: Reader, token: int, context: int) -> jax.Array:
    """F32 logits [1, V] after one more token, of the last half of the context where it is full."""
    if len(reader.tokens) < context:
        return reader.append(token)
    return reader.read([*reader.tokens, token][-max(1, context // 2) :])[0]


def generate_run(
    run_dir: Path,
    prompt: str | Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    step: int | None,
    fallback: bool,
) -> Generator[str, None, None]:
    """Text of a run's model after a text or its tokens, of its newest checkpoint or that of `step`,
    on one device wherever it was trained.

    A run's context is its `train.seq_len`, which is no limit of the text: where it is full, its
    last half is read again, and of a longer prompt only the last `train.seq_len` tokens are read.
    """
    if not prompt:
        raise UserError(EMPTY_PROMPT)  # before anything is read
    require_run(run_dir)
    from moe_jax.inference.load import open_model

    loaded = open_model(run_dir, step=step, fallback=fallback)
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    # Without a start token: training saw none.
    return generate(
        loaded,
        Reader(loaded.session()),
        loaded.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt,
        Sampler([options], loaded.tokenizer.num_ids),
        max_tokens=max_tokens,
        slide=True,
    )
