"""Experts among a model's named arrays: copied, removed, or made from a dense feed-forward part.
Numpy only.

An array is known by its name, such as `params/stacks/0/blocks/1/mlp/router/weight` or
`opt_state/0/mu/` and the same; which of its dims counts experts shows in the shape that the new
model has for it, so moments need no rule of their own.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from moe_jax.models.parameters import Parameter
from moe_jax.models.paths import ParameterPath

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


class Change(NamedTuple):
    """Where each of a layer's experts comes from."""

    source_LE: np.ndarray  # int, the expert that it was, or that it copies
    copied_LE: np.ndarray  # bool, whether it is a copy


class Copies(NamedTuple):
    """How copies differ from what they copy."""

    # standard deviation of what is added to weights, over the root mean square of the expert's
    # array
    noise: float
    moments: Literal["zero", "copy"]
    seed: int


def choose(load_LE: np.ndarray, num_experts: int, groups: int = 1) -> Change:
    """Which experts to copy, or to keep, for another number of them.

    More: the busiest gets a copy, then the next, and, when each has one, the busiest another;
    copies come after the experts. Fewer: the busiest stay, in their order. Of equal loads the
    expert with the lower number counts as the busier, so that copies that have no load yet go
    first. With `groups` this holds within each group, which keeps its experts together.
    """
    layers, before = load_LE.shape
    size, wanted = before // groups, num_experts // groups
    order_LGE = np.argsort(-load_LE.reshape(layers, groups, size), axis=-1, kind="stable")
    if wanted < size:
        own_LGE = np.sort(order_LGE[..., :wanted], axis=-1)
    else:
        kept_LGE = np.broadcast_to(np.arange(size), (layers, groups, size))
        own_LGE = np.concatenate(
            [kept_LGE, order_LGE[..., np.arange(wanted - size) % size]], axis=-1
        )
    source_LGE = own_LGE + np.arange(groups)[:, None] * size
    copied_LGE = np.broadcast_to(np.arange(wanted) >= size, source_LGE.shape)
    return Change(source_LGE.reshape(layers, -1), copied_LGE.reshape(layers, -1))


def carry(
    old: Arrays,
    shapes: Shapes,
    change: Change,
    layers: dict[tuple[int, int], list[int]],
    copies: Copies,
) -> Arrays:
    """The arrays of the model after a change, of those with `shapes`; experts lie in logical order,
    before and after.

    `layers` is `expert_layers`. Left out are moments that are of another kind in the new model:
    Adafactor's, where the number of experts is among the two sizes by which it factors.
    """
    new: Arrays = {}
    for name, shape in shapes.items():
        array, path = old[name], ParameterPath.parse(name)
        dims = [dim for dim, (a, b) in enumerate(zip(array.shape, shape, strict=False)) if a != b]
        if array.shape == shape:
            new[name] = array
        elif array.ndim == len(shape) and len(dims) == 1 and path.stack is not None:
            rows = layers[path.layer_block]
            new[name] = _taken(
                name, array, dims[0], change.source_LE[rows], change.copied_LE[rows], copies
            )
    return new


def _taken(
    name: str,
    array: np.ndarray,
    dim: int,
    source_RE: np.ndarray,
    copied_RE: np.ndarray,
    copies: Copies,
) -> np.ndarray:
    """The array [repeats, ...] with the experts of `source_RE` along `dim`."""
    broad = [1] * array.ndim
    broad[0], broad[dim] = source_RE.shape
    taken = np.take_along_axis(array, source_RE.reshape(broad), axis=dim)
    return _as_copies(
        name,
        taken,
        copied_RE.reshape(broad),
        copies,
        tuple(i for i in range(1, array.ndim) if i != dim),
    )


def _as_copies(
    name: str, array: np.ndarray, copied: np.ndarray, copies: Copies, inner: tuple[int, ...]
) -> np.ndarray:
    """The array with noise, or without moments, where it holds copies; `inner` are the dims of one
    expert's part.
    """
    if name.startswith("opt_state"):
        return array if copies.moments == "copy" else np.where(copied, 0, array).astype(array.dtype)
    is_vector = (
        not inner
    )  # a router's bias: one number an expert, whose noise would be relative to itself
    if not copies.noise or is_vector:
        return array
    rms = np.sqrt(np.mean(np.square(array), axis=inner, keepdims=True, dtype=np.float64))
    noise = _draw(copies.seed, name, array.shape) * (copies.noise * rms).astype(array.dtype)
    return np.where(copied, array + noise, array)


def from_dense(
    old: Arrays,
    before: Mapping[str, Parameter],
    shapes: Shapes,
    after: Mapping[str, Parameter],
    num_experts: int,
    copies: Copies,
) -> Arrays:
    """The arrays of a model whose experts are copies of a dense model's feed-forward parts.

    `before` and `after` are the parameters of both models. Routers are drawn as in a new model, by
    `copies.seed`; biases of routers are zero. Moments without a counterpart are left out, which
    starts them at zero: routers', and experts' where Adafactor's are of another shape.
    """
    where = {
        (parameter.path.within, layer): (path, row)
        for path, parameter in before.items()
        for row, layer in enumerate(parameter.layers or ())
    }
    new: Arrays = {}
    for name, shape in shapes.items():
        path = ParameterPath.parse(name)
        if path.stack is None:
            if name in old and old[name].shape == shape:
                new[name] = old[name]
            continue
        layers = after[path.parameter].layers or ()
        if path.is_router:
            if path.prefix == "params/":
                new[name] = new_router(path, layers, shape, copies.seed)
            continue
        rows = [where[path.dense_counterpart, layer] for layer in layers]
        inner = shape[2:] if path.is_expert else shape[1:]
        parts = [
            part
            for at, row in rows
            if (part := _row(old, path.prefix + at, row, inner)) is not None
        ]
        if len(parts) != len(rows) or shape[:1] != (len(rows),):
            continue
        array = np.stack(parts)
        if path.is_expert:
            array = np.repeat(array[:, None], num_experts, axis=1)
            array = _as_copies(
                name, array, np.ones((1,) * array.ndim, bool), copies, tuple(range(2, array.ndim))
            )
        new[name] = array
    return new


def _row(old: Arrays, name: str, row: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """One layer of an array, or None where there is no such array, or it is a placeholder of
    Adafactor's.
    """
    array = old.get(name)
    return (
        array[row] if array is not None and array.shape[1:] == shape and row < len(array) else None
    )


def new_router(
    path: ParameterPath, layers: tuple[int, ...], shape: tuple[int, ...], seed: int
) -> np.ndarray:
    """A new router's weight [repeats, D, E], the same for a layer however layers are stacked, or
    its bias.
    """
    if not path.is_matrix:
        return np.zeros(shape, np.float32)
    rows = [_draw(seed, f"{path.within} of layer {layer}", shape[1:]) for layer in layers]
    return np.stack(rows) * np.float32(shape[1] ** -0.5)


def _draw(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers, f32, that depend on the seed and the name alone."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(
        shape, np.float32
    )
