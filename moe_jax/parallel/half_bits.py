"""bf16 arrays as 16-bit integers, where a program that cuts a part out of one would convert it all.

XLA:CPU computes in bf16 by converting to f32 before and back afterwards, and counts cutting out and
updating as computing: for one expert of a bank, or one key in a cache, it converts the whole array
in every step (docs/log.md). Integers it cuts as they are. So an engine on the CPU gives its
programs the bits of bf16 weights (`as_bits`, which copies nothing), its cache is made of bits
(`held_type`), and programs convert what they have cut out (`as_floats`).

No array of weights has the type of these bits otherwise.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from moe_jax.runtime.platform import default_platform, platform_of

BITS = np.dtype(np.uint16)


def held_type(dtype: Any, mesh: Mesh | AbstractMesh) -> np.dtype:
    """The type in which programs for a mesh take and return arrays of `dtype`."""
    concrete = isinstance(mesh, Mesh)
    platform = platform_of(mesh.devices.flat[0]) if concrete else default_platform()
    return BITS if dtype == jnp.bfloat16 and not platform.cuts_halves else np.dtype(dtype)


def as_bits(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Arrays (or their shapes) as programs for a mesh take them, in the same memory."""
    if held_type(jnp.bfloat16, mesh) != BITS:
        return tree
    return jax.tree.map(lambda a: _bits(a) if a.dtype == jnp.bfloat16 else a, tree)


def _bits(array: Any) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, BITS, sharding=array.sharding)
    if isinstance(array, np.ndarray):
        return array.view(BITS)
    # A CPU's array takes over aligned memory, and that of another array is.
    shards = [
        jax.device_put(np.asarray(shard.data).view(BITS), shard.device)
        for shard in array.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def are_bits(array: jax.Array) -> bool:
    """Whether an array stands for bf16 by its bits."""
    return array.dtype == BITS


def as_floats(array: jax.Array) -> jax.Array:
    """An array, or bf16 from its bits."""
    return lax.bitcast_convert_type(array, jnp.bfloat16) if are_bits(array) else array


def converted(array: jax.Array, held: Any) -> jax.Array:
    """Floats in the type `held`, which may be that of bits."""
    if held == BITS:
        return lax.bitcast_convert_type(array.astype(jnp.bfloat16), BITS)
    return array.astype(held)
