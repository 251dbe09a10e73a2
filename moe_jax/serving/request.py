"""What a request to the engine is, and what comes back: the interface between the API and the
engine, without JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from moe_jax.generation.sampling_options import SamplingOptions


class TokenFilter(Protocol):
    """Says which tokens may come next."""

    def allowed(self) -> np.ndarray:
        """Bool [num_ids]."""

    def accept(self, token: int) -> None:
        """Goes on behind a token that was drawn."""


@dataclass(frozen=True)
class Request:
    """One text to continue."""

    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    token_filter: TokenFilter | None = None


class Token(NamedTuple):
    """A token that was drawn."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Finished(NamedTuple):
    """The end of a text."""

    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""


class ExpertStats(NamedTuple):
    """Where experts are, how busy their devices are, and what moving them took."""

    slots: np.ndarray  # [MoE layers, slots]: the expert in each, -1 for none
    ranks: int  # each has as many consecutive slots
    device_choices: np.ndarray | None = None  # [MoE layers, ranks], since the last move
    before: float | None = None  # of devices' loads max/mean, mean over layers, at the last plan
    moves: int = 0  # slots that got another expert
    pauses: int = 0  # between two steps, for a part of a move
    pause_seconds: float = 0.0
    longest_pause: float = 0.0


@dataclass(frozen=True)
class EngineStats:
    """What an engine tells of itself."""

    running: int = 0
    waiting: int = 0
    slots: int = 0
    cache_use: float = 0.0
    preemptions: int = 0  # how often a request had to wait for room in the cache once more
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    compilations: int = 0  # since the engine was started
    stalled_seconds: float = 0.0
    step_seconds: float = 0.0  # of the newest step; 0 where nothing runs
    expert_cache_hits: int | None = None  # None where all experts are on the devices
    expert_cache_misses: int | None = None
    expert_counts: np.ndarray | None = None  # [MoE layers, experts]; of late, not of this step
    experts: ExpertStats | None = None
