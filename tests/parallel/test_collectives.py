"""Sums between real CPU processes, which Gloo adds up, and gathers in several ways."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax.parallel import collectives
from moe_jax.runtime import platform
from tests.support.command import run_module
from tests.support.saved_state import mesh


@pytest.mark.slow
def test_what_the_package_sums_between_processes_is_right_at_any_size() -> None:
    """Also where a device is left 4 MiB, at which Gloo's reduce-scatter gave corrupt chunks (jax
    issue 40830): the transpose of our gather has none.
    """
    done = run_module("scattering")
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        wrong = {name: count for name, count in found.items() if not name.endswith("has")}
        sizes = {name.split()[1] for name in wrong}
        assert sizes == {"1", "8"}
        for size in sizes:
            assert (wrong[f"ours {size}"], wrong[f"psum {size}"]) == (0, 0), found
        # Only the third, which nothing in the package uses between CPU processes, has it.
        assert [found[f"{name} has"] for name in ("ours", "psum", "psum_scatter")] == [
            False,
            False,
            True,
        ]


@pytest.mark.parametrize("dim", [0, 1])
def test_one_axis_at_a_time_gathers_and_scatters_the_same(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    axes = ("data", "expert")
    spec = PartitionSpec(*(axes if at == dim else None for at in range(2)))

    def results(by_axis: bool) -> tuple[jax.Array, ...]:
        record = dataclasses.replace(platform.default_platform(), gathers_by_axis=by_axis)
        monkeypatch.setitem(platform.PLATFORMS, "cpu", record)

        def local(x: jax.Array) -> tuple[jax.Array, ...]:
            whole = collectives.all_gather(x, axes, dim)
            weight = jnp.cos(jnp.arange(whole.size, dtype=jnp.float32)).reshape(whole.shape)
            place = 1.0 + collectives.rank(axes)
            gradient = jax.grad(
                lambda x: jnp.sum(weight * place * collectives.all_gather(x, axes, dim) ** 2)
            )(x)
            scattered = collectives.reduce_scatter(weight * place * whole, axes, dim)
            return collectives.pmax(whole, axes), gradient, scattered

        sharded = jax.shard_map(
            local, mesh=mesh(2, 4), in_specs=spec, out_specs=(PartitionSpec(), spec, spec)
        )
        return jax.jit(sharded)(x)

    by_axis, at_once = results(True), results(False)
    np.testing.assert_array_equal(by_axis[0], x)
    for one, other in zip(by_axis[1:], at_once[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    weight = np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
    np.testing.assert_allclose(by_axis[2], 36 * weight * x, rtol=1e-5, atol=1e-5)
