"""Initial values of parameters, drawn where they are kept: each device makes its own part of each
array, one layer and one expert at a time.

Threefry makes element i of an array from the key and i alone, so a part of
`jax.random.normal(key, shape)` can be drawn by itself, and the values depend on neither mesh nor
placement. `jax.random` has no function for it, and the compiler cannot be left to cut the whole
draw into parts: it drew the experts of Qwen3-30B-A3B whole before it gave each device its slots,
82 GB per device (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.extend.random import threefry2x32_p
from jax.sharding import PartitionSpec as P

from moe_jax.models.paths import path_of
from moe_jax.parallel.collectives import rank
from moe_jax.placement.table import EMPTY
from moe_jax.runtime.platform import default_platform
from moe_jax.utils.annotations import Array, Int, UInt

PRNG = "threefry2x32"  # the kind of key that these values are drawn from

Indices = tuple[jax.Array | int, ...]


def normal_part(
    key: UInt[Array, 2], shape: tuple[int, ...], start: Indices, size: tuple[int, ...]
) -> jax.Array:
    """The part [size] of `jax.random.normal(key, shape)` that begins at `start`, f32, the same to
    the last bit; `key` is a threefry key's data.
    """
    high, low = jnp.broadcast_arrays(*_element_numbers(shape, start, size))
    keys = (jnp.broadcast_to(word, size) for word in key)
    bits_high, bits_low = threefry2x32_p.bind(*keys, high, low)
    # As in jax.random.uniform and normal: 23 random bits between 1 and 2, then -1 to 1, then the
    # inverse error function.
    one = jnp.uint32(0x3F800000)
    unit = lax.bitcast_convert_type((bits_high ^ bits_low) >> 9 | one, jnp.float32) - 1.0
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(least, unit * (np.float32(1) - least) + least)
    return np.float32(np.sqrt(2)) * lax.erf_inv(uniform)


def _element_numbers(
    shape: tuple[int, ...], start: Indices, size: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The number of each element of a part in the whole array's order, as the two halves of 64
    bits.
    """
    high = low = jnp.zeros((1,) * len(shape), jnp.uint32)
    for dim, length in enumerate(shape):
        high, low = _times(high, low, length)
        iota = lax.broadcasted_iota(jnp.uint32, (1,) * dim + (size[dim],), dim)
        index = (iota + jnp.asarray(start[dim], jnp.uint32)).reshape(
            *iota.shape, *(1,) * (len(shape) - dim - 1)
        )
        low = low + index
        high = high + (low < index).astype(jnp.uint32)  # the carry
    return high, low


def _times(high: jax.Array, low: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """The two halves of a 64-bit number times a number below 2^32."""
    upper, lower = np.uint32(factor >> 16), np.uint32(factor & 0xFFFF)
    a, b = low >> 16, low & 0xFFFF
    middle = a * lower + (b * lower >> 16)
    other = b * upper + (middle & 0xFFFF)
    carried = a * upper + (middle >> 16) + (other >> 16)
    return high * np.uint32(factor) + carried, low * np.uint32(factor)


@dataclass(frozen=True)
class InitialValue:
    """What a parameter starts as: normal with standard deviation `std`, zeros for 0, or ones for
    None.
    """

    leading: tuple[int, ...]  # repeats, if it is of a stack
    shape: tuple[int, ...]  # of one layer, experts in logical order
    std: float | None

    @classmethod
    def of(cls, variable: nnx.Variable) -> InitialValue:
        """That of a parameter of a model, which may be abstract."""
        shape, dims = variable.get_value().shape, len(variable.get_metadata("axes"))
        return cls(shape[:-dims], shape[-dims:], variable.get_metadata("std"))


def draw_parameters(
    values: Any,
    keys: Any,
    specs: Any,
    expert_LP: Int[Array, "L P"],
    rows_of: dict[tuple[int, int], list[int]],
) -> Any:
    """This device's parts of all parameters, inside `shard_map`.

    Trees alike: `values` of `InitialValue`, `keys` as a model has them whose random stream is
    called `keys`, and `specs` of PartitionSpecs. `expert_LP` has the expert in each of this
    device's slots, and `rows_of` says which of its rows the repeats of a block are
    (`expert_layers`).
    """

    def one(keys_of: tuple[Any, ...], value: InitialValue, key: jax.Array, spec: P) -> jax.Array:
        path = path_of(keys_of)
        slots_RP = expert_LP[np.array(rows_of[path.layer_block])] if path.is_expert else None
        return _draw_one(value, key, spec[len(value.leading) :], slots_RP)

    return jax.tree.map_with_path(one, values, keys, specs)


def _all_at_once(body: Callable[[Any], jax.Array], inputs: Any) -> jax.Array:
    return jax.vmap(body)(inputs)


def _draw_one(
    value: InitialValue, key: jax.Array, axes: Any, slots_RP: jax.Array | None
) -> jax.Array:
    """One parameter's part [repeats if stacked, ...]; an expert's by the expert of each slot."""
    dims = list(zip(value.shape, axes, strict=True))
    size = tuple(length // (lax.axis_size(names) if names else 1) for length, names in dims)
    start: Indices = tuple(
        rank(names) * part if names else 0 for part, (_, names) in zip(size, dims, strict=True)
    )
    if not value.std:  # no bank of experts starts as ones, so empty slots are zeros
        slots = () if slots_RP is None else slots_RP.shape[1:]
        fill = 1.0 if value.std is None else 0.0
        return jnp.full((*value.leading, *slots, *size[len(slots) :]), fill, jnp.float32)
    std: float = value.std

    def dense(key: jax.Array) -> jax.Array:
        return std * normal_part(key, value.shape, start, size)

    def expert(key_and_slot: tuple[jax.Array, jax.Array]) -> jax.Array:
        key, slot = key_and_slot
        first: Indices = (jnp.maximum(slot, 0), *start[1:])
        part = normal_part(key, value.shape, first, (1, *size[1:]))[0]
        return jnp.where(slot == EMPTY, 0.0, std * part)

    # Where a loop cannot stack its results, all at once.
    each = lax.map if default_platform().stacks_in_loops else _all_at_once
    if slots_RP is None:
        return each(dense, key) if value.leading else dense(key)
    per_slot = jnp.repeat(key, slots_RP.shape[1], axis=0)
    parts = each(expert, (per_slot, slots_RP.reshape(-1)))
    return parts.reshape(*slots_RP.shape, *size[1:])
