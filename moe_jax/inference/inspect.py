"""What a model would take on a mesh, from config.json and safetensors headers alone: no weights,
and of this machine only what it holds weights in and how much memory it has.

source = find(Path("Qwen3-30B-A3B"))
inspection = inspect(source.describe(), mesh=MeshConfig(expert=2), quantize="int4")
inspection.held_bytes                                  # of weights, on each device
print_inspection(inspection)

The plan is the one that an engine has, made for an abstract mesh, so a laptop can look at a mesh of
any size.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.inference.kv_cache import CacheLayout, places_for
from moe_jax.inference.memory import WeightMemory, weight_bytes_per_device, weight_memory
from moe_jax.inference.offload import check_size
from moe_jax.model_io.describe import Description
from moe_jax.model_io.source import INT4_GROUP
from moe_jax.models.layer_pattern import count_moe_layers, layer_kinds
from moe_jax.models.parameters import PARAMETER_KINDS, by_kind
from moe_jax.models.paths import ParameterPath
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.models.weight_layout import bytes_of
from moe_jax.parallel.collectives import AXES
from moe_jax.placement.table import EMPTY, Placement, contiguous
from moe_jax.profiling.network import NetworkEstimate, estimate_network
from moe_jax.runtime.platform import default_platform
from moe_jax.utils.units import gibibytes, ranges, si


class HeldExperts(NamedTuple):
    """What the devices of one rank of the `expert` axis hold in every MoE layer; numbers in ranges,
    such as `0-3, 8`.
    """

    devices: str
    experts: str
    empty_slots: int


class Inspection(NamedTuple):
    """A model on a mesh. What is "per device" is the same for each device of the mesh."""

    name: str
    source: str
    dtype: str
    quantization: str
    held_in: str  # both in words
    mesh: dict[str, int]
    parameters: dict[str, int]  # by kind
    active: dict[str, int]  # those that one token uses
    file_bytes: dict[str, int] | None
    whole_bytes: dict[str, int]  # as one device that holds everything has them
    held_bytes: dict[str, int]  # a device
    experts: list[HeldExperts]
    cache_bytes_per_token: int  # of one sequence, each head counted once
    context: int
    batch: int
    cache_bytes: int  # a device, for `batch` sequences of `context` tokens
    total_bytes: int  # a device
    memory: int | None
    fits: bool | None
    here: WeightMemory | None
    """Its weights on this machine, if that has the mesh's devices and no `memory` was given."""
    network: NetworkEstimate | None
    """Decoding over hosts with one device each; None where nothing is exchanged."""
    notes: tuple[str, ...]


def inspect(
    described: Description,
    *,
    mesh: MeshConfig | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    group: int = INT4_GROUP,
    memory: int | None = None,
    context: int | None = None,
    batch: int = 1,
    expert_cache: int | None = None,
) -> Inspection:
    """Plans a model for a mesh; arguments as those of `open_model`, `context` by default the
    model's own.

    Raises UserError where the mesh does not divide the model, a converted folder is asked for in
    another type, or the experts' cache cannot be.
    """
    model, moe, mesh = described.model, described.moe, mesh or MeshConfig()
    if described.packed:
        _refuse_other_types(described, dtype, quantize)
        group = described.group
    kind: Any = quantize or described.quantization
    held_in = described.dtype if described.packed else dtype or _own_dtype()
    types: dict[str, Any] = {"dtype": held_in, "quantization": kind, "group": group}
    single, plan = _plan(described, MeshConfig(), types), _plan(described, mesh, types)
    parameters = {path: math.prod(weight.shape) for path, weight in single.weights.items()}

    def used(path: str) -> int:
        if ParameterPath.parse(path).is_expert:
            return parameters[path] // moe.num_experts * moe.top_k
        return parameters[path]

    if expert_cache is not None:
        check_size(plan, expert_cache)
    held = by_kind(plan.weights, lambda path: _device_bytes(plan, path, expert_cache))
    context = context or described.context
    rows = -(-batch // mesh.data) * mesh.data
    cache = _cache_bytes(plan, rows, places_for(context, context), whole=False)
    total = sum(held.values()) + cache
    notes = _notes(plan, described, context, expert_cache)
    if dtype is None and not described.packed:
        notes.append(f"This machine holds weights in {held_in} if there is no --dtype.")
    if memory is not None and sum(held.values()) <= memory < total:
        notes.append("The weights alone fit: lower --context or --batch for the rest.")
    return Inspection(
        name=described.name,
        source=described.source,
        dtype=plan.dtype.name,
        quantization=kind,
        held_in=plan.held_in,
        mesh={"data": mesh.data, "expert": mesh.expert, "tensor": mesh.tensor},
        parameters=by_kind(parameters, parameters.__getitem__),
        active=by_kind(parameters, used),
        file_bytes=described.file_bytes,
        whole_bytes=by_kind(single.weights, lambda path: bytes_of(single.weights[path])),
        held_bytes=held,
        experts=_experts(plan.placement, mesh) if count_moe_layers(model, moe) else [],
        cache_bytes_per_token=_cache_bytes(single, 1, 1, whole=True),
        context=context,
        batch=batch,
        cache_bytes=cache,
        total_bytes=total,
        memory=memory,
        fits=None if memory is None else total <= memory,
        here=_on_this_machine(plan, described, expert_cache) if memory is None else None,
        network=estimate_network(plan, batch),
        notes=(*described.notes, *notes),
    )


def _plan(described: Description, axes: MeshConfig, types: dict[str, Any]) -> ServingPlan:
    """The model on a mesh without devices."""
    mesh = AbstractMesh(
        (axes.data, axes.expert, axes.tensor), AXES, axis_types=(AxisType.Auto,) * 3
    )
    return described_plan(described, mesh, **types)


def described_plan(described: Description, mesh: Mesh | AbstractMesh, **types: Any) -> ServingPlan:
    """The model on a mesh, its experts in order; `types` as for `ServingPlan`."""
    model, moe = described.model, described.moe
    placement = contiguous(count_moe_layers(model, moe), moe.num_experts, mesh.shape["expert"])
    return ServingPlan(model, moe, mesh, placement, vocab_size=described.vocab_size, **types)


def _own_dtype() -> str:
    """What this machine holds weights in, if nobody says otherwise. Raises UserError where its
    devices cannot be asked, as while another process has the TPU.
    """
    try:
        return default_platform().dtype
    except RuntimeError as error:
        raise UserError(
            f"the devices of this machine do not say what they hold weights in ({error}): give "
            f"--dtype."
        ) from error


def _on_this_machine(
    plan: ServingPlan, described: Description, expert_cache: int | None
) -> WeightMemory | None:
    """The weights beside this machine's memory; None where it has not so many devices, or they
    cannot be asked.
    """
    try:
        if not default_platform().simulated and plan.mesh.size > jax.device_count():
            return None
    except RuntimeError:
        return None
    return weight_memory(plan, packs=described.masters, expert_cache=expert_cache)


def _refuse_other_types(described: Description, dtype: str | None, quantize: str | None) -> None:
    for option, asked, has in (
        ("--dtype", dtype, described.dtype),
        ("--quantize", quantize, described.quantization),
    ):
        if asked not in (None, has):
            raise UserError(
                f"{option} {asked} but {described.name} was converted to {has}: leave the option "
                f"out, or convert it again."
            )


def _device_bytes(plan: ServingPlan, path: str, expert_cache: int | None) -> int:
    """Bytes of a parameter that each device of the mesh holds, of experts only `expert_cache` per
    layer if given.
    """
    size, slots = weight_bytes_per_device(plan, path), plan.placement.num_slots
    if expert_cache is None or not ParameterPath.parse(path).is_expert:
        return size
    return size // slots * min(expert_cache, slots)


def _cache_bytes(plan: ServingPlan, batch: int, length: int, *, whole: bool) -> int:
    """Bytes of a cache, whole or what each device holds of it."""
    return sum(
        math.prod(a.shape if whole else a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(CacheLayout(plan).abstract(batch, length))
    )


def _experts(placement: Placement, mesh: MeshConfig) -> list[HeldExperts]:
    """Experts by rank of the `expert` axis; devices are numbered in the order data, expert,
    tensor.
    """
    numbers = np.arange(mesh.size).reshape(mesh.data, mesh.expert, mesh.tensor)
    slots_RP = placement.physical_to_logical[0].reshape(mesh.expert, -1)
    return [
        HeldExperts(
            ranges(numbers[:, rank].ravel()),
            ranges(slots[slots != EMPTY]),
            int((slots == EMPTY).sum()),
        )
        for rank, slots in enumerate(slots_RP)
    ]


def _notes(
    plan: ServingPlan, described: Description, context: int, expert_cache: int | None
) -> list[str]:
    """What the figures do not say by themselves."""
    notes = []
    if expert_cache is not None:
        host, experts = plan.expert_bytes(), plan.moe.num_experts
        kept = min(expert_cache, experts)
        notes.append(
            f"The device keeps {kept} of the {experts} experts of a layer, and the host's memory "
            f"all of them: {gibibytes(host)}."
        )
    windows = [kind.window for kind in layer_kinds(plan.model, plan.moe) if kind.window]
    if windows:
        notes.append(
            f"{len(windows)} of {plan.model.num_layers} layers look back on {windows[0]:,} "
            f"tokens at most; the cache keeps all tokens "
            "for them too."
        )
    if context > described.context:
        notes.append(f"The model was made for {described.context:,} tokens.")
    idle = plan.idle_note()
    return notes if idle is None else [*notes, idle]


# What is shown.


def to_json(inspection: Inspection) -> str:
    """Everything, with the sums over kinds beside the kinds."""
    values = inspection._asdict() | {"experts": [entry._asdict() for entry in inspection.experts]}
    if inspection.here is not None:
        values["here"] = inspection.here._asdict() | {"fits": inspection.here.fits}
    sums = {
        f"{name}_total": sum(values[name].values())
        for name in ("parameters", "active", "whole_bytes", "held_bytes")
    }
    if inspection.network is not None:
        links = [link._asdict() for link in inspection.network.links]
        values["network"] = inspection.network._asdict() | {"links": links}
    if inspection.file_bytes is not None:
        sums["file_bytes_total"] = sum(inspection.file_bytes.values())
    return json.dumps(values | sums, indent=2)


def print_inspection(inspection: Inspection) -> None:
    """Prints tables of at most 80 columns, without frames or colours in a pipe."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    frame = box.ROUNDED if console.is_terminal else None
    devices = math.prod(inspection.mesh.values())
    axes = ",".join(f"{axis}={size}" for axis, size in inspection.mesh.items() if size > 1)
    console.print(escape(f"{inspection.name}: {inspection.source}"))
    console.print(
        f"in {inspection.held_in} on "
        + (f"{devices:,} devices ({axes})" if devices > 1 else "one device")
    )
    table = Table(
        "",
        *(("parameters", "active", "in the file", "held whole", "per device")),
        box=frame,
        pad_edge=False,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    columns = (
        inspection.parameters,
        inspection.active,
        inspection.file_bytes,
        inspection.whole_bytes,
        inspection.held_bytes,
    )
    for kind in (kind for kind in PARAMETER_KINDS if kind in inspection.parameters):
        table.add_row(kind, *_row([None if column is None else column[kind] for column in columns]))
    table.add_row(
        "all",
        *_row([None if column is None else sum(column.values()) for column in columns]),
        style="bold",
    )
    console.print(table)
    if inspection.experts:
        experts = Table(
            "devices", "experts of every MoE layer", "empty slots", box=frame, pad_edge=False
        )
        for entry in inspection.experts:
            experts.add_row(entry.devices, entry.experts, str(entry.empty_slots))
        console.print(experts)
    whole, device = sum(inspection.whole_bytes.values()), sum(inspection.held_bytes.values())
    console.print(f"weights         {_both(whole)} whole, {_both(device)} per device")
    console.print(f"KV cache        {inspection.cache_bytes_per_token:,} bytes per token")
    console.print(
        f"                {_both(inspection.cache_bytes)} per device for {inspection.batch:,} x "
        f"{inspection.context:,} tokens"
    )
    console.print(
        f"total           {_both(inspection.total_bytes)} per device, activations not counted"
    )
    if inspection.memory is not None:
        verdict = "[green]It fits[/]" if inspection.fits else "[red]It does not fit[/]"
        console.print(
            f"{verdict}: {gibibytes(inspection.total_bytes)} of {gibibytes(inspection.memory)} "
            f"per device."
        )
    here = inspection.here
    if here is not None and here.free is not None:
        verdict = "[green]The weights fit[/]" if here.fits else "[red]The weights do not fit[/]"
        whose = "in all" if here.shared and devices > 1 else "per device"
        console.print(
            f"{verdict} into this machine: {gibibytes(here.needed)} of {gibibytes(here.free)} "
            f"{whose}."
        )
    if inspection.network is not None:
        console.print(_network_table(inspection.network, frame))
    for note in inspection.notes:
        console.print(escape(note))


def _network_table(network: NetworkEstimate, frame: Any) -> Any:
    """What a step would take over hosts."""
    from rich.table import Table

    table = Table(
        "decoding over hosts: estimate",
        *("exchange, ms", "tokens/s at most", "tokens/s"),
        box=frame,
        pad_edge=False,
        caption=f"{network.messages:,} messages in a row and {si(network.bytes_sent, 'B')} sent "
        f"per step; the last column adds the reading of "
        f"{si(network.weight_bytes, 'B')} of weights at "
        f"{si(network.memory_bandwidth, 'B/s')}.",
        caption_justify="left",
        caption_style="",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for link in network.links:
        table.add_row(
            link.link,
            f"{1000 * link.exchange_seconds:.1f}",
            f"{link.tokens_per_second_at_most:.1f}",
            f"{link.tokens_per_second:.1f}",
        )
    return table


def _row(values: list[int | None]) -> list[str]:
    """Cells: two counts, then sizes."""
    return [
        "-" if value is None else f"{value:,}" if at < 2 else gibibytes(value)
        for at, value in enumerate(values)
    ]


def _both(size: int) -> str:
    """A size in powers of two and of ten."""
    return f"{gibibytes(size)} ({si(size, 'B')})"
