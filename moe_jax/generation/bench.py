"""Speed of a model: prefill and decoding apart, each against what it is worth, without the time
that compiling takes.

    figures = bench(loaded, loaded.session(batch=1), prompt=512, generated=128)
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from moe_jax.errors import UserError
from moe_jax.generation.sampling import Sampler
from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.profiling import machine
from moe_jax.profiling.clock import compile_clock
from moe_jax.profiling.machine import read_bandwidth

if TYPE_CHECKING:
    from moe_jax.inference.session import LoadedModel, Session


def bench(
    loaded: LoadedModel,
    session: Session,
    *,
    prompt: int = 512,
    generated: int = 128,
    repeats: int = 5,
) -> dict[str, Any]:
    """Median speeds over `repeats` after a warm-up, for a session's rows of random tokens.

    Returns: `prefill_*` of `prompt` tokens per row; `decode_*` of `generated` steps after them, one
    token per row each, always the likeliest; `first_token_seconds`, the prefill and the choice of a
    token; bytes that a step has to read, the rate at which this machine reads, and the share of
    that rate that decoding reached; `compile_seconds`; `peak_bytes`.

    Raises:
      UserError: the rows would not fit the context.
    """
    if prompt + generated > loaded.context:
        raise UserError(
            f"-p {prompt} and -g {generated} make {prompt + generated} tokens and the model's "
            f"context is {loaded.context}: lower them."
        )
    compiled = compile_clock().seconds
    batch, plan = len(session.lengths), loaded.engine.plan
    # A tokenizer may have more ids than the model has rows, or fewer.
    most = max(1, min(loaded.tokenizer.num_ids - 1, plan.vocab_size))
    rows = np.random.default_rng(0).integers(0, most, (batch, prompt)).tolist()
    greedy = Sampler([SamplingOptions(temperature=0.0)] * batch)
    # The warm-up: the cache grows to its size, then both compile for it.
    _decode(session, greedy, greedy.draw(_prefill(session, rows)), generated)
    _decode(session, greedy, greedy.draw(_prefill(session, rows)), 1)
    prefills, first_tokens, steps, rates = [], [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        logits_BV = jax.block_until_ready(_prefill(session, rows))
        prefills.append(time.perf_counter() - start)
        token_B = greedy.draw(logits_BV)
        first_tokens.append(time.perf_counter() - start)
        steps += _decode(session, greedy, token_B, generated)
        # In turns with the steps: on a shared machine it changes by the minute.
        rates.append(read_bandwidth(plan.mesh.size))
    prefill, step = statistics.median(prefills), statistics.median(steps)
    needed, rate = plan.decode_bytes(batch), statistics.median(rates)
    return {
        "model": loaded.name,
        "prompt_tokens": prompt,
        "generated_tokens": generated,
        "batch": batch,
        "repeats": repeats,
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": batch * prompt / prefill,
        "first_token_seconds": statistics.median(first_tokens),
        "decode_tokens_per_second": batch / step,
        "decode_ms_per_step": step * 1e3,
        "decode_bytes_per_step": needed,
        "read_bytes_per_second": rate,
        "floor_ms_per_step": needed / rate * 1e3,
        "share_of_floor": needed / rate / step,
        "compile_seconds": compile_clock().seconds - compiled,
        "peak_bytes": machine.peak_bytes(),
        "platform": jax.default_backend(),
        "devices": plan.mesh.size,
    }


def _prefill(session: Session, rows: list[list[int]]) -> jax.Array:
    """Reads the rows from their beginning: f32 logits [B, V]."""
    for row in range(len(rows)):
        session.rewind(row, 0)
    return session.feed(rows)


def _decode(session: Session, greedy: Sampler, token_B: np.ndarray, count: int) -> list[float]:
    """Seconds of each of `count` greedy steps after `token_B`."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        token_B = greedy.draw(session.feed([[int(token)] for token in token_B]))
        seconds.append(time.perf_counter() - start)
    return seconds
