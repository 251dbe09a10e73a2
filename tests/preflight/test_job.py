"""`moe-jax preflight` on simulated devices: figures, JSON, and what it refuses."""

from __future__ import annotations

import json

import pytest

from tests.support.command import call

SMALL = (
    *("model.num_layers=1", "model.width=32", "model.num_heads=2", "model.num_kv_heads=2"),
    *("model.vocab_size=64", "moe.num_experts=4", "moe.hidden=16", "train.seq_len=16"),
    *("train.global_batch=8", "devices.simulate=0"),
)


def arguments(*sets: str, topology: str = "cpu:8") -> list[str]:
    """The command line of a small run."""
    words = ["preflight", "configs/tiny.yaml", "--topology", topology]
    return words + [word for pair in (*SMALL, *sets) for word in ("--set", pair)]


@pytest.fixture(scope="module")
def small() -> dict:
    """The result for a model of one layer."""
    from moe_jax.config.load import load_config
    from moe_jax.preflight.job import preflight
    from tests.support import ROOT

    config = load_config(ROOT / "configs/tiny.yaml", list(SMALL))
    return json.loads(json.dumps(preflight(config, "cpu:8").as_json()))


def test_programs_and_their_sizes(small):
    programs = {one["name"]: one for one in small["programs"]}
    assert list(programs) == ["initial_state", "train_step", "evaluation"]
    step = programs["train_step"]
    # The new state takes the place of the old one.
    assert step["peak_bytes"] < step["argument_bytes"] + step["output_bytes"] + step["temp_bytes"]
    assert step["peak_bytes"] >= step["argument_bytes"] + step["temp_bytes"]
    initial, evaluation = programs["initial_state"], programs["evaluation"]
    assert abs(initial["output_bytes"] - step["argument_bytes"]) < 2_000  # and a batch
    # Two moments lie there while the parameters are evaluated.
    assert evaluation["resident_bytes"] > evaluation["argument_bytes"]
    assert small["temp_bytes"] == step["temp_bytes"] > 0
    assert small["compile_seconds"] == step["compile_seconds"] > 0
    assert small["fits"] and all(one["fits"] for one in programs.values())


def test_collectives_of_the_step(small):
    step = next(one for one in small["programs"] if one["name"] == "train_step")
    sent = {(one["kind"], tuple(one["axes"])): one for one in step["collectives"]}
    pools = sent["all-to-all", ("expert",)]
    assert pools["devices"] == 4 and pools["times"] == 5 and not pools["dynamic"]
    # Rows of 16 tokens x 2 choices x 1.25 / 4 ranks = 10 per pool: four times, there and back in
    # both directions, and their slots once more.
    assert pools["bytes"] == 4 * 4 * 10 * 32 * 4 * 3 // 4 + 4 * 10 * 4 * 3 // 4
    assert small["collective_bytes"] == sum(one["bytes"] for one in step["collectives"])
    assert small["all_to_all_hidden_fraction"] == 0


@pytest.mark.parametrize(
    ("topology", "named"),
    [
        ("v9:4x4", "--topology v9:4x4 is unknown"),
        ("v5p", "--topology v5p is unknown"),
        ("gpu:h900x8", "gpu:h100x64"),
        ("cpu:0", "--topology cpu:0 is unknown"),
        ("cpu:4", "is 8 devices and --topology cpu:4 has 4: set a mesh of 4, such as"),
    ],
)
def test_topologies_that_cannot_be(topology, named, capsys):
    assert call(*arguments(topology=topology)) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
