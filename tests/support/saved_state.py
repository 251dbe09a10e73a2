"""A small training state for tests of checkpoints, and how states are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.checkpoint.manager import Checkpoints


def mesh(data: int, expert: int) -> Mesh:
    return jax.make_mesh(
        (data, expert),
        ("data", "expert"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: data * expert],
    )


def make_state(mesh: Mesh, seed: int = 0) -> dict[str, Any]:
    """Dicts, a list, optax NamedTuples, a scalar, bfloat16, raw PRNG bits, an empty array."""
    rng = np.random.default_rng(seed)

    def put(array: Any, *spec: str | None) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    # two layers, eight slots
    experts = put(rng.standard_normal((2, 8, 8, 4), np.float32), None, "expert", "data")
    params = {
        "embed": put(rng.standard_normal((16, 8), np.float32), "data"),
        "stacks": [{"blocks": [{"mlp": {"experts": {"gate_up": experts}}}]}],
        "norm": put(np.asarray(rng.standard_normal(8), jnp.bfloat16)),
        "none": put(np.zeros((0, 4), np.float32)),
    }
    moments = optax.adam(1e-3).init(params)
    moments = jax.tree.map(lambda x: put(x) if x.ndim == 0 else x, moments)
    return {
        "params": params,
        "opt_state": moments,
        "rng": put(np.array([1, 2**32 - 1], np.uint32)),
        "step": put(np.int32(seed)),
    }


def saved(
    directory: Path,
    *steps: int,
    keep_last: int = 9,
    keep_best: int = 0,
    losses: dict[int, float] | None = None,
) -> Checkpoints:
    checkpoints = Checkpoints(directory, keep_last, keep_best)
    for step in steps:
        checkpoints.save(
            step, make_state(mesh(2, 4), step), {"step": step}, (losses or {}).get(step), wait=True
        )
    return checkpoints


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def target_of(state: Any, mesh: Mesh) -> Any:
    """The state's structure on `mesh`, with each array's partition spec."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)
        ),
        state,
    )


def assert_same(found: Any, expected: Any) -> None:
    """The same structure, types and values."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)  # type: ignore[operator]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
