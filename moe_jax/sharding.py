"""Parameters and the mesh: one table from logical dimension names to mesh axes.

A parameter names its dimensions once; how it is stored (its PartitionSpec) and how it is used (which
dimension is gathered first) follow from the table. FSDP: dense parameters are stored in shards of their
width over `data` and `expert`, expert slots over `expert` and, inside a slot, over `data`; each is
gathered just before use and its gradient reduce-scattered by the transpose. `tensor` dimensions are
never gathered.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.spmd import all_gather

RULES: dict[str, tuple[str, ...]] = {
    "width": ("data", "expert"),  # FSDP of dense parameters
    "slot_width": ("data",),  # FSDP inside an expert slot
    "slots": ("expert",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "hidden": ("tensor",),
    "experts": (),
    "gate_up": (),
    "head": (),
    "norm": (),
}
GATHERED = ("width", "slot_width")


def spec(axes: tuple[str, ...], leading: int = 0) -> PartitionSpec:
    """PartitionSpec of a parameter with logical `axes` under `leading` stacked dimensions.

    Raises ValueError if a name has no rule or two dimensions claim one mesh axis.
    """
    used: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = [None] * leading
    for name in axes:
        if name not in RULES:
            raise ValueError(f"logical axis {name!r} has no rule: the names are {sorted(RULES)}")
        for axis in RULES[name]:
            if axis in used:
                raise ValueError(f"axes {axes}: {name!r} and {used[axis]!r} both claim mesh axis {axis!r}")
            used[axis] = name
        entries.append(RULES[name] or None)
    return PartitionSpec(*entries)


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float | None) -> nnx.Param:
    """An f32 parameter with named dimensions, normal with standard deviation `std`, or ones for None."""
    if std is None:
        return nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def gather(parameter: nnx.Param, dtype: Any = None) -> jax.Array:
    """This device's parameter as the computation needs it: cast to `dtype`, then gathered over its FSDP axes."""
    value = parameter.get_value()
    value = value if dtype is None else value.astype(dtype)
    for dim, name in enumerate(parameter.get_metadata("axes")):
        if name in GATHERED:
            value = all_gather(value, RULES[name], dim)
    return value


def specs(variables: Any) -> Any:
    """The PartitionSpec of each variable of an nnx state, stacked leading dimensions unsharded."""

    def one(variable: nnx.Variable) -> PartitionSpec:
        axes = variable.get_metadata("axes")
        return spec(axes, len(variable.get_value().shape) - len(axes))

    return jax.tree.map(one, variables, is_leaf=lambda x: isinstance(x, nnx.Variable))
