"""Serving with a part of the experts in host memory (--expert-cache-size)."""

from __future__ import annotations

import numpy as np

from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.serving.engine import ServingEngine
from moe_jax.serving.engine_size import EngineSize
from moe_jax.serving.request import Request, Token
from tests.support.small_models import VOCAB, case, load, load_offloaded

SIZE = EngineSize(max_batch=3, context=64, cache_tokens=128, chunk=16, block=16)


def answers(engine: ServingEngine, requests: list[Request]) -> list[list[int]]:
    streams = [engine.submit(one) for one in requests]
    return [[event.id for event in stream if isinstance(event, Token)] for stream in streams]


def test_it_says_what_a_server_says_that_holds_all_experts() -> None:
    """Two slots for six experts: prompts and steps take rounds, and nothing compiles for that."""
    chance = np.random.default_rng(5)
    kinds = (SamplingOptions(temperature=0), SamplingOptions(1.0, top_p=0.9, seed=3))
    requests = [
        Request(
            tuple(chance.integers(0, VOCAB - 1, length).tolist()),
            6,
            sampling=kinds[length % 2],
            ignore_eos=True,
        )
        for length in (3, 20, 33, 12, 50)
    ]
    found = []
    for loaded in (load(case("experts"), {}), load_offloaded(case("experts"), 2)):
        engine = ServingEngine(loaded, SIZE)
        engine.start()
        found.append(answers(engine, requests))
        assert engine.drain(120) and engine.stats().compilations == 0
    assert found[0] == found[1] and {len(tokens) for tokens in found[0]} == {6}
    stats = engine.stats()
    assert stats.expert_counts is None
    assert stats.expert_cache_hits and stats.expert_cache_misses
