"""Small tools for code that runs inside `shard_map`: every device runs the same program on its
shard.

JAX types each value there by the mesh axes over which it varies (its vma) and refuses to call
a value replicated that is not; these helpers state such casts once. Collectives over an axis of
size 1 are left out, so that the program of a single device has none (some back ends lack them).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.config import _check_vma  # there is no public switch

from moe_jax.runtime.distributed import process_count
from moe_jax.runtime.platform import default_platform

AxisNames = str | tuple[str, ...]  # a mesh axis, several as one, or () for none: one device


class MeshAxes(NamedTuple):
    """The mesh axes by what they split; their names are the mesh's own."""

    data: AxisNames = "data"  # tokens
    expert: AxisNames = "expert"  # tokens and experts
    tensor: AxisNames = "tensor"  # hidden dims

    @property
    def batch(self) -> tuple[str, ...]:
        """The axes that split tokens."""
        return (*axis_names(self.data), *axis_names(self.expert))

    @property
    def all(self) -> tuple[str, ...]:
        """Every axis."""
        return (*self.batch, *axis_names(self.tensor))


def axis_names(axes: AxisNames) -> tuple[str, ...]:
    """The names as a tuple."""
    return (axes,) if isinstance(axes, str) else axes


MESH_AXES = MeshAxes()  # those of the package's own mesh
AXES, BATCH_AXES = MESH_AXES.all, MESH_AXES.batch


def vma(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which `x` may differ from device to device; empty outside `shard_map`."""
    kind: Any = jax.typeof(x)
    return (
        kind.mat.varying if hasattr(kind, "mat") else kind.vma
    )  # the attribute's name changed between JAX releases


def vary(tree: Any, axes: frozenset[str] | tuple[str, ...]) -> Any:
    """The same values, typed as varying over `axes` too; the transpose sums cotangents over those
    axes.
    """

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in sorted(axes) if axis not in vma(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """All arrays typed as varying over the axes over which any of them does."""
    return vary(arrays, frozenset().union(*(vma(x) for x in arrays)))


def without_types(run: Any, *arrays: Any) -> Any:
    """`run(*arrays)` where JAX types nothing by the axes over which it varies; results are typed
    as varying over all axes over which any of the arrays does.

    For kernels of libraries, whose results have no such type; `run` has no collective, and its
    gradient is taken elsewhere.
    """
    axes = frozenset().union(*(vma(x) for x in jax.tree.leaves(arrays)))
    with _check_vma(False):
        results = run(*arrays)
    return vary(results, axes)


def all_gather(x: jax.Array, axes: AxisNames, dim: int) -> jax.Array:
    """Concatenates the shards of all devices along mesh `axes` on dimension `dim`; the transpose is
    a reduce-scatter.
    """
    if lax.axis_size(axes) == 1:
        return x
    if default_platform().gathers_by_axis:  # the last axis numbers the shards that lie side by side
        for axis in reversed(_larger_than_one(axes)):
            x = lax.all_gather(x, axis, axis=dim, tiled=True)
        return x
    if process_count() > 1 and jax.default_backend() == "cpu":
        return _all_gather_between_hosts(x, axes, dim)
    return lax.all_gather(x, axes, axis=dim, tiled=True)


def _larger_than_one(axes: AxisNames) -> tuple[str, ...]:
    return tuple(axis for axis in axis_names(axes) if lax.axis_size(axis) > 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather_between_hosts(x: jax.Array, axes: AxisNames, dim: int) -> jax.Array:
    """`all_gather` whose transpose is an exchange and a sum in the order of the ranks.

    Gloo's reduce-scatter, which XLA:CPU uses between processes, now and then gives other sums than
    the last time (jax issue 40830; docs/log.md): equal runs parted within three steps.
    """
    return lax.all_gather(x, axes, axis=dim, tiled=True)


def _gather_forward(x: jax.Array, axes: AxisNames, dim: int) -> tuple[jax.Array, None]:
    return _all_gather_between_hosts(x, axes, dim), None


def _gather_backward(axes: AxisNames, dim: int, _: None, gathered: jax.Array) -> tuple[jax.Array]:
    return (_sum_in_order(gathered, axes, dim),)


_all_gather_between_hosts.defvjp(_gather_forward, _gather_backward)


def reduce_scatter(x: jax.Array, axes: AxisNames, dim: int) -> jax.Array:
    """The sum over all devices along mesh `axes`, of which each keeps its block of dimension
    `dim`.
    """
    if lax.axis_size(axes) == 1:
        return x
    if default_platform().gathers_by_axis:
        for axis in _larger_than_one(axes):
            x = lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
        return x
    if process_count() > 1 and jax.default_backend() == "cpu":
        return _sum_in_order(x, axes, dim)
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def _sum_in_order(x: jax.Array, axes: AxisNames, dim: int) -> jax.Array:
    """`reduce_scatter` as an exchange and a sum in the order of the ranks."""
    ranks, shape = lax.axis_size(axes), x.shape
    parts = x.reshape(*shape[:dim], ranks, shape[dim] // ranks, *shape[dim + 1 :])
    return jnp.sum(lax.all_to_all(parts, axes, split_axis=dim, concat_axis=dim), axis=dim)


def all_to_all(x: jax.Array, axis: AxisNames) -> jax.Array:
    """Swaps blocks of the first dimension [R*C, ...]: block r goes to rank r, and block r of the
    result came from it.
    """
    return (
        x
        if lax.axis_size(axis) == 1
        else lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)
    )


def psum(tree: Any, axes: AxisNames) -> Any:
    """The sum over the devices along mesh `axes`, which may be none; typed as the same on all of
    them.

    Over one device it is only needed for that type. Where nothing tracks which values vary (a mesh
    of one device), the program then has no collective.
    """
    return _over_devices(lax.psum, tree, axes)


def pmax(tree: Any, axes: AxisNames) -> Any:
    """The largest over the devices along mesh `axes`, as `psum`."""
    return _over_devices(lax.pmax, tree, axes)


def pmin(tree: Any, axes: AxisNames) -> Any:
    """The least over the devices along mesh `axes`, as `psum`."""
    return _over_devices(lax.pmin, tree, axes)


def _over_devices(collective: Any, tree: Any, axes: AxisNames) -> Any:
    names = axis_names(axes)
    if not names:
        return tree
    if lax.axis_size(names) > 1:
        return collective(tree, names)
    # What is typed as varying over one device needs a sum of it to lose that type.
    return jax.tree.map(lambda x: x if vma(x).isdisjoint(names) else lax.psum(x, names), tree)


def rank(axes: AxisNames) -> jax.Array:
    """This device's place along mesh `axes`, int32; a constant where there is one device."""
    if lax.axis_size(axes) == 1:
        return vary(jnp.int32(0), axis_names(axes))
    return lax.axis_index(axes)


def once(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`x` on the first device along mesh `axes`, zeros on the others: what all of them hold alike,
    made a part of a sum.
    """
    for axis in axes:
        if lax.axis_size(axis) > 1:
            x = jnp.where(lax.axis_index(axis) == 0, x, jnp.zeros((), x.dtype))
    return x
