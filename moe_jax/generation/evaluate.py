"""Perplexity of a model on a text, with nats per token and bits per byte.

evaluation = evaluate(loaded, read_text(Path("text.txt")), window=2048)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_jax.errors import UserError
from moe_jax.profiling.clock import Stopwatch
from moe_jax.utils.files import read_characters

if TYPE_CHECKING:
    from moe_jax.inference.load import LoadedModel

DEFAULT_WINDOW = 2048


class Evaluation(NamedTuple):
    """How well a model predicts a text."""

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    """Bits per byte of the text's UTF-8: comparable across tokenizers."""
    tokens: int
    """Tokens that were predicted: all but the first, which has no token before it."""
    bytes: int
    """Bytes of the text that they stand for."""
    window: int
    seconds: float
    """Without compiling."""


def evaluate(
    loaded: LoadedModel, text: str, window: int | None = None, special: bool = True
) -> Evaluation:
    """Scores every token of `text` except the first, once each, in windows of `window` tokens that
    do not overlap.

    A window's first token is predicted only from the last token of the window before. A progress
    bar goes to stderr.

    Args:
      window: Tokens per window; by default the smaller of the model's context and 2,048.
      special: Begin with a start token, if the tokenizer adds one to a prompt.

    Raises:
      UserError: the text has fewer than two tokens, the window exceeds the context, or the model's
        loss is not finite.
    """
    window = min(loaded.context, DEFAULT_WINDOW) if window is None else window
    if window > loaded.context:
        raise UserError(
            f"--window {window} exceeds the model's context of {loaded.context} tokens: lower it, "
            f"or raise --context."
        )
    tokens = np.asarray(
        loaded.tokenizer.encode_prompt(text) if special else loaded.tokenizer.encode(text), np.int32
    )
    if len(tokens) < 2:
        raise UserError(f"The text has {len(tokens)} tokens: give one of at least two.")
    loaded.engine.plan.check_tokens(int(tokens.max()))
    window = min(window, len(tokens) - 1)
    with Stopwatch() as watch:
        nats, count = _score(loaded, tokens, window)
    size = len(text.encode("utf-8", errors="replace")) - len(
        loaded.tokenizer.decode(tokens[:1].tolist()).encode()
    )
    return Evaluation(
        nats_per_token=nats / count,
        perplexity=_perplexity(nats / count),
        bits_per_byte=nats / math.log(2) / max(size, 1),
        tokens=count,
        bytes=size,
        window=window,
        seconds=watch.seconds,
    )


def _score(loaded: LoadedModel, tokens: np.ndarray, window: int) -> tuple[float, int]:
    """(nats, predicted tokens) of all windows, with a progress bar. Raises UserError where nats are
    not finite.
    """
    columns = (
        TextColumn("evaluating"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[so_far]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    rows = loaded.engine.plan.mesh.shape["data"]
    nats, count = 0.0, 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=math.ceil((len(tokens) - 1) / window), so_far="")
        for begin in range(0, len(tokens) - 1, window):
            window_nats, predicted = loaded.engine.score(*_window(tokens, begin, window, rows))
            nats, count = nats + float(window_nats), count + int(predicted)
            if not math.isfinite(nats):
                raise UserError(
                    "The model's loss is not finite (NaN or infinite): its weights are damaged, "
                    "or try --dtype float32."
                )
            bar.update(task, advance=1, so_far=f"perplexity {_perplexity(nats / count):,.3f}")
    return nats, count


def _window(
    tokens: np.ndarray, begin: int, window: int, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, targets, mask) of one window, each [rows, window]. The last window is padded to the
    same shape, so that nothing compiles again.

    The window is the first row. The others, which a `data` axis needs, are masked.
    """
    inputs, targets = tokens[begin : begin + window], tokens[begin + 1 : begin + 1 + window]
    filled = np.zeros((2, rows, window), np.int32)
    filled[0, 0, : len(inputs)], filled[1, 0, : len(targets)] = inputs, targets
    mask = np.zeros((rows, window), np.float32)
    mask[0, : len(targets)] = 1
    return filled[0], filled[1], mask


def _perplexity(nats_per_token: float) -> float:
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def read_text(path: Path) -> str:
    """The text of `--text`. Raises UserError if it cannot be read, is empty, or is not UTF-8."""
    try:
        text = read_characters(path)
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path} is not UTF-8 (byte {error.start}): convert it.") from error
    except OSError as error:
        raise UserError(
            f"--text {path}: {error.strerror}; check the path and its permissions."
        ) from error
    if not text:
        raise UserError(f"--text {path} is empty: give a file with text.")
    return text
