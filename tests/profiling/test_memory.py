"""Bytes on a device follow from shapes and shardings; those of a state add up by kind."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.profiling.memory import bytes_per_device, per_device


def test_each_device_holds_its_shard_of_every_array() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    shapes = {
        "cut": jax.ShapeDtypeStruct((8, 4), jnp.float32),
        "whole": jax.ShapeDtypeStruct((6,), jnp.bfloat16),
    }
    shardings = {
        "cut": NamedSharding(mesh, PartitionSpec(("data", "expert"))),
        "whole": NamedSharding(mesh, PartitionSpec()),
    }
    assert per_device(shapes, shardings) == 8 * 4 * 4 // 4 + 6 * 2


def test_a_states_bytes_are_those_of_its_shards() -> None:
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def put(shape: tuple[int, ...], *spec: str) -> jax.Array:
        return jax.device_put(jnp.zeros(shape), NamedSharding(mesh, PartitionSpec(*spec)))

    block = {"mlp": {"experts": {"down": put((1, 4, 2, 2), None, "expert")}}}
    params = {"embedding": put((2, 3)), "stacks": {0: {"blocks": {0: block}}}}
    state = SimpleNamespace(params=params, opt_state=[{"mu": params}])
    one = {
        "dense_parameters": 24,
        "expert_parameters": 32,
        "dense_optimizer": 24,
        "expert_optimizer": 32,
    }
    assert bytes_per_device(state) == {str(device.id): one for device in jax.devices()[:2]}
