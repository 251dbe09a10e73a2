"""A tiny training step by the TPU compiler, where that is installed."""

from __future__ import annotations

import pytest

from moe_jax.config.load import load_config
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import make_mesh
from moe_jax.preflight.bounds import link_of
from moe_jax.preflight.chips import find_target
from moe_jax.preflight.job import preflight
from moe_jax.preflight.measure import Sent
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
