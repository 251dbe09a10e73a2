"""bf16 arrays as bits: the same memory, on every device, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config.schema import MeshConfig
from moe_jax.parallel import half_bits
from moe_jax.parallel.mesh import make_mesh
from moe_jax.runtime.metal import METAL_ON_CPU
from moe_jax.runtime.platform import standing_in

NUMBERS = [1.0, -2.5, 0.0, 3.0e38, 1e-40, np.inf, -0.0, 0.1]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(expert=2), jax.devices()[:2])


def test_weights_share_their_memory_with_their_bits(mesh):
    half = jnp.asarray([NUMBERS, NUMBERS[::-1]], jnp.bfloat16)
    tree = {
        "split": jax.device_put(half, NamedSharding(mesh, P("expert"))),
        "alike": jax.device_put(half, NamedSharding(mesh, P())),
        "host": np.asarray(half),
        "shape": jax.ShapeDtypeStruct(half.shape, half.dtype, sharding=NamedSharding(mesh, P())),
        "scale": jnp.ones(3, jnp.float32),
    }
    held = half_bits.as_bits(tree, mesh)
    assert held["scale"] is tree["scale"]
    for name in ("split", "alike", "host", "shape"):
        assert (held[name].dtype, held[name].shape) == (np.uint16, half.shape), name
    for name in ("split", "alike"):
        assert held[name].sharding == tree[name].sharding
        shards = zip(held[name].addressable_shards, tree[name].addressable_shards, strict=True)
        for bits, floats in shards:
            pointers = [one.data.unsafe_buffer_pointer() for one in (bits, floats)]
            assert bits.device == floats.device and pointers[0] == pointers[1]
    assert held["shape"].sharding == tree["shape"].sharding
    assert np.shares_memory(held["host"], tree["host"])
    expected = np.asarray(half).view(np.uint16)
    np.testing.assert_array_equal(held["split"], expected)
    back = jax.jit(half_bits.as_floats)(held["split"])
    assert back.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(back).view(np.uint16), expected)


def test_what_is_put_among_bits_is_rounded_to_bf16():
    numbers = jnp.asarray(NUMBERS, jnp.float32)
    put = jax.jit(half_bits.converted, static_argnums=1)
    expected = np.asarray(numbers.astype(jnp.bfloat16)).view(np.uint16)
    np.testing.assert_array_equal(put(numbers, half_bits.BITS), expected)
    assert put(numbers, jnp.dtype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert half_bits.as_floats(numbers) is numbers


def test_other_platforms_and_types_stay_as_they_are(mesh):
    half = jnp.ones((2, 2), jnp.bfloat16)
    abstract = AbstractMesh((2,), ("expert",), axis_types=(AxisType.Auto,))
    assert half_bits.held_type(jnp.bfloat16, mesh) == half_bits.held_type(jnp.bfloat16, abstract)
    assert half_bits.held_type(jnp.float32, mesh) == np.float32
    with standing_in(METAL_ON_CPU):
        assert half_bits.held_type(jnp.bfloat16, mesh) == jnp.bfloat16
        assert half_bits.as_bits(half, mesh) is half
