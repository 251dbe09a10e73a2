"""Experts that move while requests run: where the load falls, and that nobody notices."""

from __future__ import annotations

import time

import numpy as np
import pytest

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.inference.session import LoadedModel
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.placement.cost import max_over_mean, planned_traffic
from moe_jax.placement.schedule import plan_migration
from moe_jax.placement.table import EMPTY, Placement, contiguous
from moe_jax.placement.topology import one_host
from moe_jax.serving.engine import ServingEngine
from moe_jax.serving.engine_size import EngineSize
from moe_jax.serving.expert_balance import ExpertBalance, by_device, by_expert, plan_tables
from moe_jax.serving.request import Finished, Request
from tests.serving.test_engine import SECONDS, read, request
from tests.support.small_models import Case, draw, load

RANKS, LAYERS, EXPERTS = 4, 2, 16
HOT = 4  # experts, all on the first device


def load_of(table: Placement, load_LE: np.ndarray) -> np.ndarray:
    """Load of each layer's busiest device over the mean."""
    traffic_LRE = np.repeat(load_LE[:, None] / table.ranks, table.ranks, axis=1)
    return max_over_mean(planned_traffic(table, traffic_LRE, one_host(table.ranks)).load_LR)


@pytest.mark.parametrize("redundant", [0, 1])
def test_each_table_on_the_way_is_one_call_and_the_last_is_even(redundant: int) -> None:
    layers, budget = 6, 4 + redundant
    start = contiguous(layers, EXPERTS, RANKS, redundant)
    load_LE = np.ones((layers, EXPERTS))
    load_LE[:, :HOT] = 40
    load_LE[5] = 1  # this layer is even as it is
    tables = plan_tables(load_LE, load_LE, start, budget)
    assert len(tables) > 1
    for old, new in zip([start, *tables], tables, strict=False):
        assert len(plan_migration(old, new, budget).calls) == 1
    assert load_of(start, load_LE)[:5].min() > 3
    assert load_of(tables[-1], load_LE).max() < 1.1
    np.testing.assert_array_equal(tables[-1].physical_to_logical[5], start.physical_to_logical[5])
    assert (tables[-1].physical_to_logical[:5] != EMPTY).all()
    # What was busy in one half alone is not believed.
    assert plan_tables(load_LE, np.ones_like(load_LE), start, budget) == []
    assert plan_tables(load_LE, load_LE, tables[-1], budget) == []


def test_choices_are_summed_by_expert_and_device_across_moves() -> None:
    old = Placement(np.array([[0, 1, 2, EMPTY]]), 3, 2)
    new = Placement(np.array([[0, 2, 2, 1]]), 3, 2)
    counts_LP = np.array([[5, 1, 2, 0]])
    np.testing.assert_array_equal(by_expert(old, counts_LP), [[5, 1, 2]])
    np.testing.assert_array_equal(by_device(old, counts_LP), [[6, 2]])
    balance = ExpertBalance(old, None, 1)
    balance.read(counts_LP)
    balance.moved(new, 0.25)
    balance.moved(new, 0.5)
    balance.read(np.array([[1, 2, 3, 4]]))
    np.testing.assert_array_equal(balance.choices_LE, [[6, 5, 7]])
    stats = balance.stats
    np.testing.assert_array_equal(stats.device_choices, [[3, 7]])
    assert stats[4:] == (2, 2, 0.75, 0.5)


@pytest.fixture(scope="module")
def skewed() -> LoadedModel:
    """Four devices, a spare slot on each, and a router that likes the experts of the first."""
    model = ModelConfig(width=32, hidden=32, num_layers=LAYERS, num_heads=4, num_kv_heads=4)
    moe = MoEConfig(num_experts=EXPERTS, top_k=2, hidden=16, dropless=True, shared_experts=1)
    bias_LE = np.zeros((count_moe_layers(model, moe), EXPERTS), np.float32)
    bias_LE[:, :HOT] = 0.3
    nothing = np.empty(0)
    one = Case(model, moe, draw(model, moe), bias_LE, nothing, nothing)
    placement = contiguous(LAYERS, EXPERTS, RANKS, 1)
    return load(one, {"expert": RANKS}, placement=placement, quantization="int8")


def say(engine: ServingEngine, requests: list[Request]) -> list[list[object]]:
    """Tokens with their log-probabilities, of requests that run together."""
    streams = [engine.submit(one) for one in requests]
    said = [list(stream) for stream in streams]
    assert all(isinstance(events[-1], Finished) for events in said)
    return said


def test_experts_move_under_load_and_no_token_changes(skewed: LoadedModel) -> None:
    """Against the same engine that never moves any, to the last bit of the log-probabilities."""
    requests = [request(seed, 1 + seed % 40, 10, logprobs=2) for seed in range(24)]
    size = EngineSize(max_batch=8, context=64, chunk=16, block=16)
    still = ServingEngine(skewed, EngineSize(**vars(size) | {"balance_every": 10**6}))
    still.start()
    wanted = say(still, requests)
    assert still.drain(SECONDS)
    stats = still.stats().experts
    assert stats is not None and stats.moves == 0 and stats.device_choices is not None
    uneven = max_over_mean(stats.device_choices)
    assert uneven.min() > 1.8

    moving = ServingEngine(skewed, EngineSize(**vars(size) | {"balance_every": 4}))
    moving.start()
    deadline = time.monotonic() + SECONDS
    while True:
        before = moving.stats().experts
        assert say(moving, requests) == wanted and time.monotonic() < deadline
        after = moving.stats().experts
        assert before is not None and after is not None
        if after.moves and after.pauses == before.pauses:  # all of it went by the new table
            break
    assert read(moving.submit(request(99, 30, 5)))[1] == "length"
    assert moving.drain(SECONDS) and moving.stats().compilations == 0
    assert after.before is not None and after.device_choices is not None
    assert max_over_mean(after.device_choices).max() < 1.4, (uneven, after)
    assert 0 < after.longest_pause <= after.pause_seconds and (after.slots != EMPTY).all()
    counts = moving.stats().expert_counts
    assert counts is not None and (counts.sum(1) == counts[0].sum()).all()
