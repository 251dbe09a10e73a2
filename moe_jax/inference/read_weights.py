"""A model's weights and tables on the devices, from a checkpoint that gives parts of them.

Each process reads the parts that its devices hold and nothing else, a few pieces of tensors at a
time, on as many threads as it has cores: reading, converting and quantising leave the interpreter
to the others, and so does memory that is touched for the first time. A CPU's
array takes over the memory that was read into, so the peak is the model's share plus one tensor. An
accelerator copies: one array is then there twice, and the largest comes first, when nothing else is
there. Where both memories are one, as a Mac's are, the experts' banks come in parts that are small
enough for a peak of the weights and one tensor (`cut_banks`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.models.layer_pattern import expert_layers
from moe_jax.models.paths import ParameterPath, nested
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.models.weight_layout import BankParts, WeightPlan, bytes_of, loading_order
from moe_jax.moe.tables import LayerTables, make_tables
from moe_jax.ops import quantized
from moe_jax.parallel.sharding import named
from moe_jax.placement.table import EMPTY
from moe_jax.runtime.devices import usable_cores
from moe_jax.utils.progress import byte_progress

ReadPart = Callable[[str, tuple[Any, ...]], np.ndarray]
ALIGNMENT = 64  # bytes: memory that begins at a multiple of it becomes a CPU array without a copy
QUANTIZED_AT_ONCE = 1 << 17  # weights: quantising takes a few times their memory
READ_AT_ONCE = 1 << 18  # weights that a thread reads at a time; a tensor of more is cut
READERS = 8  # threads at most: each has a piece in memory
_FREED_ONCE = 8 << 20  # bytes: more than most pieces
_quantize = jax.jit(quantized.quantize, static_argnums=(1, 2))  # of many pieces of few shapes


def serving_tables(plan: ServingPlan, bias_LE: Any) -> LayerTables:
    """The plan's routing tables with a model's selection bias, on every device."""
    tables = make_tables(plan.placement)[0]
    if bias_LE is not None:
        tables = tables._replace(bias_E=jnp.asarray(bias_LE, jnp.float32))
    return jax.device_put(tables, NamedSharding(plan.mesh, P()))


def read_params(plan: ServingPlan, read: ReadPart, *, experts_on_host: bool = False) -> Any:
    """The plan's weights from `read(path, index)`, which gives parts of training parameters in
    logical expert order.

    `index` has a slice for each dim, or an array of expert ids (-1 for none, which reads as zeros).
    On one device experts can be left where they were read to, as numpy arrays, for `offload`.
    """
    sizes = {path: bytes_of(weight) for path, weight in plan.weights.items()}
    params: dict[str, Any] = {}
    _keep_freed_memory()
    with byte_progress("loading", sum(sizes.values())) as done:
        for path in loading_order(plan.weights):
            weight = plan.weights[path]
            if experts_on_host and ParameterPath.parse(path).is_expert:
                whole = tuple(slice(None) for _ in weight.shape)
                params[path] = _read_part(plan, weight, whole, read)
            elif weight.cuts:
                parts = (_read_weight(plan, part, read) for part in weight.parts)
                params[path] = BankParts(tuple(parts))
            else:
                params[path] = _read_weight(plan, weight, read)
            done(sizes[path])
    return nested({path: params[path] for path in plan.weights})


def _order(weight: WeightPlan) -> tuple[int, ...]:
    """The training dims in the order in which they are held."""
    return weight.order or tuple(range(len(weight.shape)))


def _read_weight(plan: ServingPlan, weight: WeightPlan, read: ReadPart) -> Any:
    """One parameter or part of a bank, each distinct part of it read once and put on the devices
    that hold it. It is there when this returns: until then the host's copy is kept.
    """
    entries = [weight.spec[dim] if dim < len(weight.spec) else None for dim in _order(weight)]
    held = NamedSharding(plan.mesh, P(*entries))
    parts: dict[Any, Any] = {}
    placed: list[list[jax.Array]] = []
    for device, index in held.addressable_devices_indices_map(weight.ordered).items():
        assert index is not None
        key = tuple((part.start, part.stop) for part in index)
        if key not in parts:
            parts[key] = _read_part(plan, weight, index, read)
        placed.append([jax.device_put(array, device) for array in jax.tree.leaves(parts[key])])
    shapes, structure = jax.tree.flatten(weight.abstract())
    shardings = jax.tree.leaves(named(plan.mesh, weight.held_spec()))
    arrays = [
        jax.make_array_from_single_device_arrays(shape.shape, sharding, list(shards))
        for shape, sharding, shards in zip(
            shapes, shardings, zip(*placed, strict=True), strict=True
        )
    ]
    return jax.block_until_ready(jax.tree.unflatten(structure, arrays))


def _read_part(
    plan: ServingPlan, weight: WeightPlan, index: tuple[slice, ...], read: ReadPart
) -> Any:
    """What one device holds of a parameter, in numpy; `index` cuts its dims in the order held."""
    order, path = _order(weight), ParameterPath.parse(weight.path)
    bounds = [range(*part.indices(size)) for part, size in zip(index, weight.ordered, strict=True)]
    if weight.first:
        bounds[0] = range(weight.first + bounds[0].start, weight.first + bounds[0].stop)
    part_shape = tuple(len(bounds[order.index(dim)]) for dim in range(len(order)))
    out = jax.tree.map(
        lambda a: _aligned(a.shape, a.dtype),
        weight._replace(shape=part_shape, cuts=()).abstract(),
    )
    tensor_dims = _tensor_dims(path)
    expert_SP = _experts_in_slots(plan, path) if path.is_expert else None

    def fill(piece: list[range]) -> None:
        cut: list[Any] = [slice(part.start, part.stop) for part in piece]
        if expert_SP is not None:
            repeat, slot = (piece[tensor_dims.index(dim)][0] for dim in ("layer", "slot"))
            cut[tensor_dims.index("slot")] = expert_SP[repeat, slot : slot + 1]
        place = tuple(
            slice(part.start - bound.start, part.stop - bound.start)
            for part, bound in zip(piece, bounds, strict=True)
        )
        if weight.inputs:  # which are one dim where it is held, and never cut
            place = place[: -weight.inputs]
        jax.tree.map(
            lambda to, value: to.__setitem__(place, value.reshape(to[place].shape)),
            out,
            _pack_piece(weight, cut, read),
        )

    # First in the file are the outputs, which are first where weights are packed, else last, as an
    # embedding's vocabulary is. An expert's tensor may alternate gate and up there, which takes the
    # whole of it for each piece: it is never cut.
    cut_dim = len(tensor_dims) if weight.order is not None else len(bounds) - 1
    most = math.inf if path.is_expert else READ_AT_ONCE
    _on_threads(fill, _pieces(bounds, len(tensor_dims), cut_dim, most))
    return out


def _pieces(
    bounds: list[range], tensor_dims: int, cut_dim: int, most: float
) -> Iterator[list[range]]:
    """A part of a parameter in pieces, each of one tensor: every index of the first `tensor_dims`,
    and of `cut_dim` as much as makes `most` weights.
    """
    tensor, cut = bounds[tensor_dims:], cut_dim - tensor_dims
    size = math.prod(map(len, tensor))
    step = int(len(tensor[cut]) * most // size) if size > most else len(tensor[cut])
    step = max(1, step)
    for place in itertools.product(*bounds[:tensor_dims]):
        for start in range(tensor[cut].start, tensor[cut].stop, step):
            part = range(start, min(start + step, tensor[cut].stop))
            yield [*(range(at, at + 1) for at in place), *tensor[:cut], part, *tensor[cut + 1 :]]


def _on_threads(fill: Callable[[list[range]], None], pieces: Iterable[list[range]]) -> None:
    """`fill` of each piece, several at a time; raises the first error."""
    with ThreadPoolExecutor(min(READERS, usable_cores())) as threads:
        for _ in threads.map(fill, pieces):
            pass


def _keep_freed_memory() -> None:
    """Has glibc's malloc keep what a piece took for the next one.

    It would give it back to the system and ask for it anew, which took half of the time of loading,
    until a block as large as this has been freed once. Elsewhere this does nothing.
    """
    block = np.empty(_FREED_ONCE, np.uint8)  # never touched, so it takes no memory
    del block


def _tensor_dims(path: ParameterPath) -> list[str]:
    """The leading dims of a parameter, in the order held, along which a checkpoint has a tensor for
    each entry.
    """
    dims = {
        "layer": path.stack is not None,
        "slot": path.is_expert,
        "gate_up": path.name.endswith("gate_up"),
    }
    return [name for name, there in dims.items() if there]


def _pack_piece(weight: WeightPlan, cut: list[Any], read: ReadPart) -> Any:
    """A piece of a parameter as it is held, in numpy."""
    order, whole = _order(weight), list(cut)
    if weight.kind == "int8":  # an output's scale is of all its inputs, those on other devices too
        whole[-weight.inputs :] = [slice(0, size) for size in weight.ordered[-weight.inputs :]]
    values = read(
        weight.path, tuple(whole[order.index(dim)] for dim in range(len(order)))
    ).transpose(order)
    if weight.kind == "float":
        return values if weight.order is None else quantized.PackedWeight(values)
    rows = values.reshape(math.prod(values.shape[: -weight.inputs]), -1)
    step = max(1, QUANTIZED_AT_ONCE // rows.shape[1])
    blocks = [
        _quantize(jnp.asarray(rows[at : at + step]), weight.kind, weight.group)
        for at in range(0, len(rows), step)
    ]
    packed = jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
    if weight.kind == "int8":
        apart = packed.values.reshape(values.shape)[(..., *cut[-weight.inputs :])]
        packed = dataclasses.replace(packed, values=apart)
    return packed


def _experts_in_slots(plan: ServingPlan, path: ParameterPath) -> np.ndarray:
    """The expert in each slot of the stacked layers, [layers, slots], -1 for none."""
    layers = expert_layers(plan.model, plan.moe)[path.layer_block]
    expert_SP = plan.placement.physical_to_logical[np.array(layers)]
    return np.where(expert_SP == EMPTY, -1, expert_SP)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialised memory that a CPU array can take over."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
