"""Drawing the next token from the model's logits, on the host: numpy alone, so that every back end
draws the same.

    sampler = Sampler(SamplingOptions(temperature=0.7, top_p=0.9, seed=1))
    sampler.begin(prompt_ids)
    token = sampler.draw(logits_V)

The filters and their order are those of transformers' `generate`: repetition penalty, temperature,
top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moe_jax.errors import UserError


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen. Raises UserError for a value out of its range."""

    temperature: float = 0.8
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens."""
    top_p: float | None = None
    """Choose among the likeliest tokens whose chances add up to this (nucleus sampling: Holtzman et
    al., 2020).
    """
    min_p: float | None = None
    """Choose among tokens at least this times as likely as the likeliest (Nguyen et al., 2024)."""
    repetition_penalty: float = 1.0
    """Tokens that occurred: positive logits are divided, negative ones multiplied by it (Keskar et
    al., 2019); 1 is none.
    """
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fine, range_text in (
            ("temperature", 0 <= self.temperature < np.inf, ">= 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, ">= 1"),
            ("top_p", self.top_p is None or 0 <= self.top_p <= 1, "between 0 and 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "> 0"),
            ("seed", self.seed >= 0, ">= 0"),
        ):
            if not fine:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is out of range: it must be {range_text}."
                )


class Sampler:
    """Draws the tokens of one text after another; the same seed and logits give the same tokens."""

    def __init__(self, options: SamplingOptions, num_ids: int | None = None):
        """Draws from the first `num_ids` tokens (by default all): ids after them pad the vocabulary
        and stand for no text.
        """
        self.options = options
        self._num_ids = num_ids
        self._generator = np.random.default_rng(options.seed)
        self._occurred: set[int] = set()

    def begin(self, prompt: Iterable[int]) -> None:
        """Starts a text after `prompt`, whose tokens the repetition penalty counts as having
        occurred.
        """
        self._occurred = set(prompt)

    def draw(self, logits_V: np.ndarray) -> int:
        """One token id from f32 logits [V]. Raises UserError where the logits are not finite."""
        logits_V = self._penalised(logits_V[: self._num_ids])
        token = int(np.argmax(logits_V))  # a NaN counts as the largest
        if not np.isfinite(logits_V[token]):
            raise UserError(
                "The model's logits are not finite (NaN or infinite): its weights are damaged, or "
                "try --dtype float32."
            )
        if self.options.temperature > 0:
            ids, chance = distribution(logits_V, self.options)
            heaps = np.cumsum(chance, dtype=np.float64)
            place = int(np.searchsorted(heaps, self._generator.random() * heaps[-1], side="right"))
            place = min(place, len(heaps) - 1)  # rounding may reach the very end
            token = place if ids is None else int(ids[place])
        self._occurred.add(token)
        return token

    def _penalised(self, logits_V: np.ndarray) -> np.ndarray:
        penalty = self.options.repetition_penalty
        if penalty == 1 or not self._occurred:
            return logits_V
        ids = np.fromiter(self._occurred, np.int64, len(self._occurred))
        ids = ids[ids < len(logits_V)]
        logits_V = logits_V.copy()
        logits_V[ids] = np.where(
            logits_V[ids] > 0, logits_V[ids] / penalty, logits_V[ids] * penalty
        )
        return logits_V


def distribution(
    logits_V: np.ndarray, options: SamplingOptions
) -> tuple[np.ndarray | None, np.ndarray]:
    """(ids, chances not normalised) of the tokens that the filters leave, likeliest first and of
    equals the first first.

    Without top-k and top-p nothing is sorted; ids None then stands for the whole vocabulary in its
    order. With them only the tokens that may be left are sorted, not the vocabulary. Temperature is
    above 0.
    """
    ids = (
        None
        if options.top_k is None or options.top_k >= len(logits_V)
        else _largest(logits_V, options.top_k)
    )
    kept = logits_V if ids is None else logits_V[ids]
    with np.errstate(over="ignore"):  # a difference beyond f32's range has no chance, as it should
        chance = np.exp((kept - kept.max()) / np.float32(max(options.temperature, 1e-30)))
    if options.top_p is not None and options.top_p < 1:
        total = float(np.sum(chance, dtype=np.float64))
        if ids is None:
            ids = _nucleus(chance, options.top_p * total)
            chance = chance[ids]
        before = np.cumsum(chance, dtype=np.float64) - chance
        count = max(1, int(np.searchsorted(before, options.top_p * total)))
        ids, chance = ids[:count], chance[:count]
    if options.min_p is not None:
        left = chance >= options.min_p  # the likeliest has a chance of 1 here
        ids = np.flatnonzero(left) if ids is None else ids[left]
        chance = chance[left]
    return ids, chance


def _largest(values_V: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, in order; of equals the first ones."""
    smallest = -np.partition(-values_V, count - 1)[count - 1]
    ids = np.flatnonzero(values_V >= smallest)
    return ids[np.argsort(-values_V[ids], kind="stable")][:count]


def _nucleus(chance_V: np.ndarray, mass: float) -> np.ndarray:
    """Indices, in order, of the likeliest tokens that together have at least `mass`, and of a few
    more.
    """
    floor = np.float32(1e-2)
    while floor > 0 and np.sum(chance_V[chance_V >= floor], dtype=np.float64) < mass:
        floor *= np.float32(1e-2)
    ids = np.flatnonzero(chance_V >= floor)
    return ids[np.argsort(-chance_V[ids], kind="stable")]
