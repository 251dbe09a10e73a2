"""A tiny training step by the TPU compiler, where that is installed."""

from __future__ import annotations

import pytest

from moe_jax.config.load import dump_config, load_config
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import make_mesh
from moe_jax.preflight.bounds import link_of
from moe_jax.preflight.chips import find_target
from moe_jax.preflight.job import preflight
from moe_jax.preflight.measure import Sent
from moe_jax.preflight.serving import Serving
from moe_jax.profiling.transfers import group_axes
from moe_jax.runtime import compile_only
from tests.preflight.test_job import SMALL
from tests.support import ROOT

needs_libtpu = pytest.mark.skipif(
    compile_only.libtpu_version() is None, reason="the TPU compiler (libtpu) is not installed"
)


def test_a_compiler_that_does_not_match_is_refused(monkeypatch):
    monkeypatch.setattr(compile_only, "libtpu_version", lambda: "0.0.1")
    with pytest.raises(UserError, match=r"libtpu 0.0.1 does not match jax .* needs libtpu==0\.0"):
        find_target("v5e:2x4")
    monkeypatch.setattr(compile_only, "libtpu_version", lambda: None)
    with pytest.raises(UserError, match=r"not installed .*pip install 'moe-jax\[preflight\]'"):
        find_target("v5e:2x4")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_serving_copies_neither_weights_nor_cache(kind, tmp_path):
    path = tmp_path / "model.yaml"
    sets = ["model.num_layers=4", "model.width=512", "model.num_heads=8", "model.num_kv_heads=2"]
    sets += ["model.head_dim=128", "model.vocab_size=1024", "moe.num_experts=16", "moe.hidden=256"]
    path.write_text(dump_config(load_config(ROOT / "configs/tiny.yaml", sets)))
    serving = Serving(path, rows=32, context=1024, prompt=256, quantize=kind)
    prefill, decode = preflight("v5e:2x4", serving=serving).programs
    assert decode.temp_bytes < 0.05 * decode.argument_bytes
    # A tile at a time: less than one layer's experts, in bf16, beside the rows.
    layer, rows = 2 * 3 * 512 * 256 * 2, 256 * 2 * 512 * 2
    assert prefill.temp_bytes < layer + 4 * rows


@needs_libtpu
@pytest.mark.slow
def test_gradients_of_two_parts_are_summed_as_the_step_says():
    """The compiler failed where it moved the head's reduce-scatter out of the loop over parts."""
    sizes = ("model.width=512", "model.vocab_size=512", "moe.hidden=256")
    sizes += ("model.tied_embeddings=false",)
    parts = ("train.global_batch=16", "train.accumulation=2", "model.compute_dtype=bfloat16")
    config = load_config(ROOT / "configs/tiny.yaml", [*SMALL, *sizes, *parts])
    [step] = preflight("v5e:2x4", config, only=["train_step"]).programs
    scattered = [one for one in step.collectives if one.kind == "reduce-scatter"]
    assert not step.refused and any(one.axes == ("data", "expert") for one in scattered)


@needs_libtpu
@pytest.mark.slow
def test_a_step_on_eight_chips():
    result = preflight("v5e:2x4", load_config(ROOT / "configs/tiny.yaml", list(SMALL)))
    told = result.as_json()
    assert told["fits"] and told["devices"] == 8 and told["memory_bytes"] == 16 * 2**30
    step = next(one for one in told["programs"] if one["name"] == "train_step")
    pools = [one for one in step["collectives"] if one["kind"] == "all-to-all"]
    assert any(one["axes"] == ["expert"] and one["times"] == 5 for one in pools)
    assert {one["link"] for one in step["collectives"]} <= {"ICI x", "ICI y", "ICI xy"}
    # A row of the mesh is a line or a square of chips, and all of them are both dims.
    mesh = make_mesh(
        load_config(ROOT / "configs/tiny.yaml", list(SMALL)).mesh, result.target.devices
    )
    everyone = Sent("all-reduce", group_axes((0, 7), dict(mesh.shape)), tuple(range(8)), *[1] * 4)
    assert link_of(everyone, result.target.chip, mesh) == ("ICI xy", 2e11)
