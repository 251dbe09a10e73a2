"""What the TPU compiler said of a served model at full depth, which takes it minutes: recorded by

moe-jax preflight --serve configs/qwen3-30b-a3b.yaml --topology v5e:2x4 --rows 32 --context 4096
    [--quantize int8 | int4] --json > tests/preflight/recorded/served-qwen3-30b-a3b-....json
"""

from __future__ import annotations

import json

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from moe_jax.inference.inspect import described_plan
from moe_jax.inference.kv_cache import CacheLayout
from moe_jax.model_io.source import INT4_GROUP, find
from moe_jax.models.weight_layout import bytes_of
from moe_jax.parallel.collectives import AXES
from moe_jax.parallel.sharding import named
from moe_jax.profiling.memory import per_device
from tests.support import ROOT

DEVICES, ROWS, CONTEXT = 8, 32, 4096


@pytest.mark.parametrize("held", ["bfloat16", "int8", "int4"])
def test_qwen3_30b_a3b_on_eight_chips(held):
    path = ROOT / f"tests/preflight/recorded/served-qwen3-30b-a3b-{held}.json"
    recorded = json.loads(path.read_text())
    prefill, decode = recorded["programs"]
    assert (prefill["name"], decode["name"]) == ("prefill", "decode")
    assert recorded["fits"] and recorded["topology"] == "v5e:2x4" and recorded["versions"]["libtpu"]
    assert decode["temp_bytes"] <= 0.05 * decode["argument_bytes"]
    assert prefill["temp_bytes"] <= 1.5e9

    # The record is of the model and the mesh as they are planned today.
    mesh = AbstractMesh((1, DEVICES, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    plan = described_plan(
        find(ROOT / "configs/qwen3-30b-a3b.yaml", yaml=True).describe(),
        mesh,
        dtype="bfloat16",
        quantization="float" if held == "bfloat16" else held,
        group=INT4_GROUP,
    )
    weights = plan.abstract_params()
    held_bytes = per_device(weights, named(mesh, plan.param_specs))
    cache = CacheLayout(plan).abstract(ROWS, CONTEXT)
    shardings = jax.tree.map(lambda array: array.sharding, cache)
    assert decode["argument_bytes"] == pytest.approx(
        held_bytes + per_device(cache, shardings), rel=0.05
    )
    # Key heads, of which there are half as many as devices, are held by all of them.
    share = sum(bytes_of(weight) for weight in plan.weights.values()) / DEVICES
    assert held_bytes <= 1.1 * share
