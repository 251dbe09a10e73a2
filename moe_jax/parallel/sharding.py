"""Parameters and the mesh: one table from logical dimension names to mesh axes.

A parameter names its dimensions once; how it is stored (its PartitionSpec) and how it is used
(which dimension is gathered first, over which axes a product is summed) follow from the table.
FSDP: dense parameters are stored in shards of their width over `data` and `expert`, expert slots
over `expert` and, inside a slot, over `data`; each is gathered just before use and its gradient
reduce-scattered by the transpose. `tensor` dimensions are never gathered.

For inference there is another table (`serving_rules`): nothing is gathered, every device keeps its
part of each matrix, and dense layers are split over `expert` too, since all its devices see the
same tokens.

Why not Flax's logical axes (`out_sharding`, `nnx.logical_axis_rules`, `nnx.get_partition_spec`):
its rules are global to the process, pass over unknown names and two dimensions on one axis, and a
parameter with such names cannot be made without a mesh. `specs` reads them for other modules.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from moe_jax.parallel.collectives import all_gather
from moe_jax.parallel.half_bits import as_floats

Rules = dict[str, tuple[str, ...]]

RULES: Rules = {
    "width": ("data", "expert"),  # FSDP of dense parameters
    "slot_width": ("data",),  # FSDP inside an expert slot
    "slots": ("expert",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "hidden": ("tensor",),
    "expert_hidden": ("tensor",),
    "experts": (),
    "gate_up": (),
    "head": (),
    "latent": (),
    "patch": (),  # values of a series, and quantiles of its forecast
    "tokens": (),  # a vocabulary of a few
    "buckets": (),
    "norm": (),
    "slot_norm": (),
}
GATHERED = ("width", "slot_width")


def serving_rules(
    mesh: Mesh | AbstractMesh,
    *,
    heads: int,
    kv_heads: int,
    head_inputs: int,
    hiddens: tuple[int, ...],
    vocab: int,
    group: int = 1,
    shares_kv: bool = True,
) -> Rules:
    """The table for inference: each kind of dims over `expert` and `tensor` together where they
    divide it, else over `tensor`.

    `head_inputs` is the number of attention's outputs that its output projection sums over,
    `hiddens` the hidden widths of dense and shared feed-forward parts; `group` of these share a
    scale and stay together on a device where `expert` is concerned. What `tensor` does not divide
    either stays whole; heads that it does not divide are the caller's to refuse. With `shares_kv`,
    fewer key heads than devices, a divisor of them, are shared: their weights are split over
    `tensor` alone, and each device computes and caches the one head of its query heads
    (`cache_heads`).
    """
    expert, tensor = mesh.shape["expert"], mesh.shape["tensor"]

    def split(sizes: tuple[int, ...], inputs: tuple[int, ...] = ()) -> tuple[str, ...]:
        both = expert * tensor
        if all(size % both == 0 for size in sizes) and all(
            size % (both * group) == 0 for size in inputs
        ):
            return ("expert", "tensor")
        return ("tensor",) if all(size % tensor == 0 for size in sizes) else ()

    attention = kv = split((heads, kv_heads), (head_inputs,))
    shared = kv_heads % tensor == 0 and expert % (kv_heads // tensor) == 0
    finer = split((heads,), (head_inputs,))
    if shares_kv and shared and "expert" in finer and "expert" not in attention:
        attention, kv = ("tensor", "expert"), ("tensor",)
    changed = {
        "heads": attention,
        "kv_heads": kv,
        "cache_heads": attention,
        "hidden": split(hiddens, hiddens),
        "vocab": split((vocab,)),
    }
    return RULES | {"width": (), "slot_width": ()} | changed


def spec(axes: tuple[str, ...], leading: int = 0, rules: Rules = RULES) -> PartitionSpec:
    """PartitionSpec of a parameter with logical `axes` under `leading` stacked dimensions.

    Raises ValueError if a name has no rule or two dimensions claim one mesh axis.
    """
    used: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = [None] * leading
    for name in axes:
        if name not in rules:
            raise ValueError(f"logical axis {name!r} has no rule: the names are {sorted(rules)}")
        for axis in rules[name]:
            if axis in used:
                raise ValueError(
                    f"axes {axes}: {name!r} and {used[axis]!r} both claim mesh axis {axis!r}"
                )
            used[axis] = name
        entries.append(rules[name] or None)
    return PartitionSpec(*entries)


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float | None
) -> nnx.Param:
    """An f32 parameter with named dimensions, normal with standard deviation `std`, or ones for
    None; sharded for training.

    If `rngs` has a stream `keys`, a normal parameter's value is the key that it would be drawn from
    (uint32 [2]): models/initial_values.py draws its parts where they are kept.
    """
    if std is None:
        value = jnp.ones(shape, jnp.float32)
    elif stream_of(rngs) == "keys":
        value = jax.random.key_data(rngs.keys())
    else:
        value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes, mesh_axes=tuple(RULES[name] for name in axes), std=std)


def stream_of(rngs: nnx.Rngs) -> str:
    """The stream that parameters take their keys from: `params`, or `keys` where nothing else is
    wanted of them.
    """
    return "keys" if "keys" in rngs else "params"


def bias(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """An f32 parameter that starts at zero, sharded for training."""
    return nnx.Param(
        jnp.zeros(shape, jnp.float32),
        axes=axes,
        mesh_axes=tuple(RULES[name] for name in axes),
        std=0.0,
    )


def apply_rules(module: nnx.Module, rules: Rules) -> None:
    """Changes how a built model's parameters are sharded, before it is split."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            node.set_metadata(mesh_axes=tuple(rules[name] for name in node.get_metadata("axes")))


def gather(parameter: nnx.Param, dtype: Any = None) -> Any:
    """This device's parameter as the computation needs it: cast to `dtype`, then gathered over its
    FSDP axes.

    A `PackedWeight` (made for inference) is given as it is.
    """
    value = parameter.get_value()
    if not isinstance(value, jax.Array):
        return value
    value = as_floats(value)
    value = value if dtype is None else value.astype(dtype)
    for dim, (name, axes) in enumerate(
        zip(parameter.get_metadata("axes"), parameter.get_metadata("mesh_axes"), strict=True)
    ):
        if name in GATHERED and axes:
            value = all_gather(value, axes, dim)
    return value


def axes_of(parameter: nnx.Param, name: str) -> tuple[str, ...]:
    """Mesh axes over which a parameter's dimension `name` is sharded: a product that contracts it
    is one device's part of a sum over them.
    """
    return parameter.get_metadata("mesh_axes")[parameter.get_metadata("axes").index(name)]


def named(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """NamedShardings on a mesh from a tree of PartitionSpecs."""
    return jax.tree.map(
        lambda one: NamedSharding(mesh, one), tree, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def specs(variables: Any) -> Any:
    """The PartitionSpec of each variable of an nnx state, stacked leading dimensions unsharded.

    Variables of other modules have the spec that Flax's `out_sharding` gives them, by default none:
    they are the same on every device.
    """

    def one(variable: nnx.Variable) -> PartitionSpec:
        names = variable.get_metadata("axes", None)
        if names is None:
            return nnx.get_partition_spec(variable).get_value() or PartitionSpec()
        rules = dict(zip(names, variable.get_metadata("mesh_axes"), strict=True))
        return spec(names, len(variable.get_value().shape) - len(names), rules)

    return jax.tree.map(one, variables, is_leaf=lambda x: isinstance(x, nnx.Variable))
