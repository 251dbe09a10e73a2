"""Sampling text from a run's checkpoint, token by token.

`Sampler` has the two calls that a key-value cache needs, `prefill` and `decode`; for now the "cache" is the text so far
and every token reads it anew, padded to one of a few lengths so that little is compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from moe_jax import relayout
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import config_from_text
from moe_jax.errors import UserError
from moe_jax.mesh import make_mesh
from moe_jax.model import count_moe_layers
from moe_jax.schema import MeshConfig
from moe_jax.step import Program, TrainState
from moe_jax.tokenizer import Tokenizer, load_tokenizer

SHORTEST = 64
EMPTY_PROMPT = "--prompt is empty: give at least one character to continue."


@dataclass(frozen=True)
class Sampler:
    """Next-token logits of one sequence; the model reads at most its last `context` tokens."""

    program: Program
    state: TrainState
    context: int

    def prefill(self, tokens: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """(cache, f32 logits [V]) after a non-empty prompt."""
        return list(tokens), self._logits(tokens)

    def decode(self, cache: list[int], token: int) -> tuple[list[int], np.ndarray]:
        """(cache, f32 logits [V]) after one more token."""
        return [*cache, token], self._logits([*cache, token])

    def _logits(self, tokens: Sequence[int]) -> np.ndarray:
        recent = np.asarray(tokens[-self.context :], np.int32)
        length = min(self.context, max(SHORTEST, 1 << (len(recent) - 1).bit_length()))
        length = max(length, len(recent))
        mesh = self.program.mesh.shape
        rows = mesh["data"] * mesh["expert"]  # one real sequence, the rest padding that is routed nowhere
        batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "targets", "positions", "segments")}
        batch["tokens"][0, : len(recent)] = recent
        batch["segments"][0, : len(recent)] = 1
        batch["positions"][:] = np.arange(length)
        batch["mask"] = np.zeros((rows, length), np.float32)
        last = np.full(rows, len(recent) - 1, np.int32)
        logits = self.program.next_logits(self.state.params, self.state.tables, self.program.shard(batch), last)
        return np.asarray(logits[0])


def sample(logits_V: np.ndarray, *, temperature: float, top_k: int | None, top_p: float | None, rng: np.random.Generator) -> int:
    """One token id: the likeliest at temperature 0, else drawn from the `top_k` likeliest, then from the likeliest of sum `top_p`."""
    logits = logits_V.astype(np.float64)
    if temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")[: top_k or len(logits)]
    chance = np.exp((logits[order] - logits[order[0]]) / temperature)
    chance /= chance.sum()
    if top_p is not None:
        before = np.cumsum(chance) - chance
        chance = np.where((before < top_p) | (np.arange(len(chance)) == 0), chance, 0.0)
        chance /= chance.sum()
    return int(rng.choice(order, p=chance))


def generate(
    sampler: Sampler,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of text as they come, until the end of the document or `max_tokens`. Raises UserError for an empty prompt."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError(EMPTY_PROMPT)
    rng = np.random.default_rng(seed)
    cache, logits = sampler.prefill(ids)
    written: list[int] = []
    shown = ""
    for _ in range(max_tokens):
        # Ids beyond the tokenizer's pad the vocabulary and stand for no text.
        token = sample(logits[: tokenizer.num_ids], temperature=temperature, top_k=top_k, top_p=top_p, rng=rng)
        if token == tokenizer.eos_id:
            break
        written.append(token)
        text = tokenizer.decode(written)
        # A character may need several tokens: an unfinished one decodes to a replacement mark.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
        if len(written) < max_tokens:
            cache, logits = sampler.decode(cache, token)
    yield tokenizer.decode(written)[len(shown) :]


def open_run(run_dir: Path, *, step: int | None = None, fallback: bool = False) -> tuple[Sampler, Tokenizer]:
    """A run's model on one device, whatever mesh it was trained on, and its tokenizer."""
    try:
        text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{run_dir} is not a run directory (it has no config.yaml): give the --run-dir of a `moe-jax train`.") from None
    config = config_from_text(text, str(run_dir / "config.yaml"))
    tokenizer = load_tokenizer(config.data.tokenizer)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best)
    saved = relayout.saved_placement(checkpoints, step, fallback)
    if saved is None:
        wanted = "" if step is None else f" of step {step} or before"
        raise UserError(f"{run_dir / 'checkpoints'} holds no checkpoint{wanted}: train first, or name another run directory.")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    moe = dataclasses.replace(config.moe, dropless=True)  # else a token could depend on the padding after it
    layers = count_moe_layers(config.model, moe)
    placement = relayout.choose_placement(saved, layers, moe.num_experts, 1, 0)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    program = Program(config.model, moe, config.optimizer, mesh, placement, vocab_size=vocab_size, steps=config.train.steps)
    found = relayout.restore_model(checkpoints, program, saved, step=step, fallback=fallback)
    return Sampler(program, found.state, config.train.seq_len), tokenizer


def generate_run(
    run_dir: Path,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    step: int | None,
    fallback: bool,
) -> Iterator[str]:
    """`generate` from a run directory's newest checkpoint, or that of `step`."""
    if not prompt:
        raise UserError(EMPTY_PROMPT)  # before anything is read
    sampler, tokenizer = open_run(run_dir, step=step, fallback=fallback)
    return generate(sampler, tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
