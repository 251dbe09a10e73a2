"""The benchmark of replanning: its predictions come from replayed steps and can be checked against
counts.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest

from moe_jax.benchmarks import placement
from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError

SIZES = dict(
    layers=1,
    width=32,
    heads=2,
    kv_heads=1,
    head_dim=16,
    experts=8,
    expert_hidden=16,
    top_k=2,
    vocab=64,
    batch=8,
    seq=64,
    dtype="float32",
    untied=False,
    remat="none",
    attention="auto",
    grouped_matmul="auto",
    accumulation=1,
    bias_rate=0.0,
)


def options(**changes: Any) -> argparse.Namespace:
    run = dict(
        capacity_factor=1.0,
        dropless=False,
        strategy="balanced",
        redundant_slots=1,
        skew=2.0,
        warmup=1,
        steps=3,
        turns=1,
    )
    return argparse.Namespace(**SIZES | run | changes)


@pytest.mark.slow
def test_what_is_predicted_is_near_what_comes():
    found = placement.benchmark_placement(options(), MeshConfig(expert=4))
    assert found["capacity_device_load_after"] < found["capacity_device_load_before"]
    assert found["dropped_fraction_after"] < found["dropped_fraction_before"]
    assert found["dropped_fraction_predicted"] == pytest.approx(
        found["dropped_fraction_after"], abs=0.06
    )
    assert found["dropless_device_load_predicted"] == pytest.approx(
        found["dropless_device_load_after"], rel=0.2
    )
    assert found["rounds_packed"] > found["rounds_after"]
    slope = (found["dropless_step_seconds_packed"] - found["dropless_step_seconds_before"]) / (
        found["rounds_packed"] - found["rounds_before"]
    )
    np.testing.assert_allclose(found["seconds_a_round"], slope)


def test_rows_of_several_data_rows_cannot_be_told_apart():
    with pytest.raises(UserError, match="--data 1"):
        placement.benchmark_placement(options(), MeshConfig(data=2, expert=4))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [(dict(accumulation=2), "--accumulation 2"), (dict(dropless=True), "--dropless")],
)
def test_options_that_it_cannot_follow_are_refused(changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        placement.benchmark_placement(options(**changes), MeshConfig(expert=4))


def test_the_program_is_what_the_options_ask_for():
    asked = options(dtype="bfloat16", remat="dots", untied=True, grouped_matmul="reference")
    program = placement.build_program(asked, MeshConfig(expert=4), dropless=True)
    assert (program.model.compute_dtype, program.model.remat) == ("bfloat16", "dots")
    assert not program.model.tied_embeddings and program.moe.grouped_matmul == "reference"
    assert program.moe.dropless and program.moe.dispatch == "pooled"
