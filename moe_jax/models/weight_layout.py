"""How a model's parameters are held for inference: which are packed, in which order of dims, and
quantised how.

A `WeightPlan` is the plan of one parameter; `ServingPlan.weights` has one for each path such as
"stacks/0/blocks/0/attention/query".
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_jax.errors import UserError
from moe_jax.models.paths import ParameterPath
from moe_jax.ops.quantized import Kind, PackedWeight, quantize

# Looked up by column, or cut across their outputs: never packed.
_PLAIN = ("embedding", "head", "kv_up")
# One output, and the router: not worth the error of quantising.
_FLOAT = ("shared_gate", "weight")


@partial(jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=())
@dataclass(frozen=True)
class BankParts:
    """The experts' weights of a stack of layers, as one array after another of some layers each."""

    parts: tuple[Any, ...]


class WeightPlan(NamedTuple):
    """The plan of one parameter."""

    path: str
    shape: tuple[int, ...]  # in the training order, stacked dims first
    spec: P  # of these dims
    order: tuple[int, ...] | None  # of the dims of the packed weight; None for a plain array
    inputs: int  # trailing input dims, which the packed weight merges into one
    kind: Kind
    group: int
    dtype: Any
    cuts: tuple[int, ...] = ()  # layers of each part, where a bank is held as `BankParts`
    first: int = 0  # of the layers of a part

    @property
    def parts(self) -> tuple[WeightPlan, ...]:
        """The plans of a bank's parts."""
        starts = itertools.accumulate(self.cuts, initial=0)
        return tuple(
            self._replace(shape=(layers, *self.shape[1:]), cuts=(), first=first)
            for first, layers in zip(starts, self.cuts, strict=False)
        )

    @property
    def ordered(self) -> tuple[int, ...]:
        """The shape with dims in the order held, input dims apart."""
        return self.shape if self.order is None else tuple(self.shape[dim] for dim in self.order)

    def unpack(self, values: Any) -> Any:
        """An array in the training order of dims, from values held in float."""
        if self.order is None:
            return values
        inverse = tuple(self.order.index(dim) for dim in range(len(self.order)))
        return values.reshape(self.ordered).transpose(inverse)

    def abstract(self) -> Any:
        """Shapes and dtypes of what is held."""
        if self.cuts:
            return BankParts(tuple(part.abstract() for part in self.parts))
        if self.order is None:
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        shape, inputs = self.ordered[: -self.inputs], math.prod(self.ordered[-self.inputs :])
        if self.kind == "float":
            return PackedWeight(jax.ShapeDtypeStruct((*shape, inputs), self.dtype))
        if self.kind == "int8":
            return PackedWeight(
                jax.ShapeDtypeStruct((*shape, inputs), jnp.int8),
                jax.ShapeDtypeStruct(shape, jnp.float32),
                "int8",
            )
        scale = jax.ShapeDtypeStruct((*shape, inputs // self.group), jnp.bfloat16)
        return PackedWeight(jax.ShapeDtypeStruct((*shape, inputs // 2), jnp.uint8), scale, "int4")

    def held_spec(self) -> Any:
        """PartitionSpecs of what is held."""
        if self.cuts:
            return BankParts(tuple(part.held_spec() for part in self.parts))
        if self.order is None:
            return self.spec
        entries = tuple(self.spec[dim] if dim < len(self.spec) else None for dim in self.order)
        entries = entries[
            : len(entries) - self.inputs + 1
        ]  # merged input dims are cut along the first
        if self.kind == "float":
            return PackedWeight(P(*entries))
        return PackedWeight(
            P(*entries), P(*(entries[:-1] if self.kind == "int8" else entries)), self.kind
        )

    def pack(self, weights: jax.Array) -> Any:
        """What is held as one array, from weights in the order held (or plain ones)."""
        if self.order is None:
            return weights.astype(self.dtype)
        weights = weights.reshape(*weights.shape[: -self.inputs], -1)
        return (
            PackedWeight(weights.astype(self.dtype))
            if self.kind == "float"
            else quantize(weights, self.kind, self.group)
        )


def plan_weight(
    path: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    spec: P,
    *,
    dtype: Any,
    kind: Kind = "float",
    group: int = 64,
    parts: int = 1,
) -> WeightPlan:
    """The plan of a parameter whose dims after the stacked ones have the logical names `axes`.

    Its inputs are cut into `parts`. Raises UserError where int4's groups do not divide them.
    """
    parsed, lead = ParameterPath.parse(path), len(shape) - len(axes)
    widths = [dim for dim, axis in enumerate(axes) if axis in ("width", "slot_width")]
    # Router biases and sinks meet f32 scores; norms compute in f32.
    if parsed.is_router or parsed.name in ("scale", "sinks"):
        dtype = jnp.float32
    if parsed.name in _PLAIN or not widths or len(axes) < 2:
        return WeightPlan(path, shape, spec, None, 0, "float", 0, dtype)
    if parsed.is_output_first:
        order, inputs = tuple(range(len(shape))), len(axes) - 1 - widths[0]
    else:
        width = lead + widths[0]
        order, inputs = (*(dim for dim in range(len(shape)) if dim != width), width), 1
    last = math.prod(shape[dim] for dim in order[-inputs:])
    wanted: Kind = "float" if parsed.name in _FLOAT else kind
    if wanted == "int4" and (last // parts) % group:
        of = f"{last}, of which each device has {last // parts}" if parts > 1 else str(last)
        smaller = next((g for g in (64, 32, 16, 8) if g < group and not last // parts % g), None)
        remedy = "" if smaller is None else f"--group {smaller} or "
        raise UserError(
            f"--quantize int4 works in groups of {group}, which do not divide the inputs of "
            f"{parsed.within.replace('/', ' ')} ({of}): use {remedy}--quantize int8."
        )
    return WeightPlan(path, shape, spec, order, inputs, wanted, group, dtype)


def bytes_of(leaf: WeightPlan, parts: int = 1) -> int:
    """Bytes of what is held, of which a device holds one of `parts`."""
    return (
        sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(leaf.abstract()))
        // parts
    )


def cut_banks(weights: dict[str, WeightPlan]) -> dict[str, WeightPlan]:
    """The plans with the experts' banks in as few parts as keep `loading_bytes` within what is held
    and one tensor more, or a part per layer.
    """
    limit = sum(map(bytes_of, weights.values())) + max(map(_tensor_bytes, weights.values()))
    banks = {path: w for path, w in weights.items() if ParameterPath.parse(path).is_expert}
    most = max((weight.shape[0] for weight in banks.values()), default=1)
    for parts in range(1, most + 1):
        found = dict(weights)
        for path, weight in banks.items():
            found[path] = weight._replace(cuts=_even(weight.shape[0], parts))
        if loading_bytes(found) <= limit:
            break
    return found if parts > 1 else weights


def _even(layers: int, parts: int) -> tuple[int, ...]:
    """Layers in so many parts, or fewer, the longer ones first."""
    parts = min(parts, layers)
    return tuple(layers // parts + (part < layers % parts) for part in range(parts))


def loading_order(weights: dict[str, WeightPlan]) -> list[str]:
    """Paths in the order in which weights are read: the largest first, when there is most room."""
    return sorted(weights, key=lambda path: bytes_of(weights[path]), reverse=True)


def loading_bytes(weights: dict[str, WeightPlan]) -> int:
    """The most memory while weights are read, where an array is there twice until it is on the
    device.
    """
    peak = held = 0
    for path in loading_order(weights):
        for part in weights[path].parts or (weights[path],):
            held += bytes_of(part)
            peak = max(peak, held + bytes_of(part))
    return peak


def _tensor_bytes(weight: WeightPlan) -> int:
    """Bytes of one of the tensors that a checkpoint has for a parameter, as they are held."""
    path = ParameterPath.parse(weight.path)
    tensors = weight.shape[0] if path.stack is not None else 1
    tensors *= weight.shape[1] if path.is_expert else 1
    return bytes_of(weight, tensors)
