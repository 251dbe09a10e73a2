"""Sums between real CPU processes, which Gloo adds up."""

from __future__ import annotations

import json

import pytest

from tests.support.command import run_module


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
