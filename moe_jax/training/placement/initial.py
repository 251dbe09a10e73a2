"""Where experts are when a run starts or goes on: the table, what connects the devices, and whether
there is room.
"""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from moe_jax.config.load import config_from_text
from moe_jax.config.schema import Config
from moe_jax.errors import UserError
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.placement.files import configured_topology, read_table
from moe_jax.placement.plan import plan_placement
from moe_jax.placement.table import Placement, contiguous, count_slots, round_robin
from moe_jax.placement.topology import Topology
from moe_jax.profiling.memory import per_device
from moe_jax.runtime.platform import platform_of
from moe_jax.training.placement.traffic_window import TrafficWindow
from moe_jax.training.restore import SavedRun
from moe_jax.training.step import TrainProgram
from moe_jax.utils.files import local_path


def mesh_topology(config: Config, mesh: Mesh) -> Topology:
    """That of placement.topology; else what the processes of the mesh's devices show, with links as
    they are commonly.

    Raises UserError for a file that cannot be read or does not match the mesh.
    """
    topology = configured_topology(config.placement, config.mesh)
    if topology is not None:
        return topology
    process_NRT = np.array([device.process_index for device in mesh.devices.flat]).reshape(
        config.mesh.data, config.mesh.expert, -1
    )
    hosts = config.mesh.data * processes_per_row(process_NRT)
    if (
        hosts == config.mesh.data
    ):  # every row within one host, or none in equal parts: as if there were one
        hosts = 1
    platform = platform_of(mesh.devices.flat[0])
    within, between = platform.link_within, platform.link_between
    return Topology(
        hosts, config.mesh.size // hosts, within, between, latency_within=1e-6, latency_between=1e-5
    )


def processes_per_row(process_NRT: np.ndarray) -> int:
    """Processes over which each data row's ranks lie in equal runs; 1 where they do not. Takes int
    [data, R, tensor].
    """
    ranks = process_NRT.shape[1]
    count = len(np.unique(process_NRT[0]))
    runs_NR = process_NRT[:, :: max(ranks // count, 1), 0]
    equal = ranks % count == 0 and np.array_equal(
        process_NRT,
        np.broadcast_to(np.repeat(runs_NR, ranks // count, axis=1)[..., None], process_NRT.shape),
    )
    return count if equal else 1


def first_placement(config: Config, topology: Topology, saved: SavedRun | None) -> Placement:
    """The table to begin with; `saved` is a resumed run's checkpoint.

    A strategy that plans follows the saved table where it fits the mesh, else plans by the load
    that was measured, else begins contiguous. The others say what their table is. Raises UserError
    for a custom table that does not fit.
    """
    layers, experts, ranks = (
        count_moe_layers(config.model, config.moe),
        config.moe.num_experts,
        config.mesh.expert,
    )
    chosen, redundant = config.placement, config.placement.redundant_slots
    if chosen.strategy == "custom":
        path = local_path(str(chosen.file))
        if saved is not None and not path.exists() and _is_its_table(saved, config):
            return saved.placement  # the run may have been moved to where the file is not
        return read_table(
            path,
            layers=layers,
            num_experts=experts,
            ranks=ranks,
            max_experts_per_device=chosen.max_experts_per_device,
        )
    if chosen.strategy == "round_robin":
        return round_robin(layers, experts, ranks, redundant)
    if chosen.strategy == "contiguous" or layers == 0:
        return contiguous(layers, experts, ranks, redundant)
    if saved is not None:
        slots = count_slots(experts, ranks, redundant)
        if (saved.placement.ranks, saved.placement.num_slots) == (ranks, slots):
            return saved.placement
    kept = (saved.meta.get("replanning") if saved is not None else None) or {}
    windows = [
        TrafficWindow.from_json(kept[name], chosen.replan_every // 2)
        for name in ("window", "before")
        if kept.get(name) is not None
    ]
    longest = max(windows, key=lambda window: window.steps, default=None)
    if longest is None or not longest.steps:
        return contiguous(layers, experts, ranks, redundant)
    load_LE = longest.traffic_LRE.sum(1)
    # What these ranks will send is not known: each an equal part.
    traffic_LRE = np.repeat(load_LE[:, None] / ranks, ranks, axis=1)
    return plan_placement(
        chosen.strategy,
        traffic_LRE,
        ranks=ranks,
        redundant_slots=redundant,
        topology=topology,
        present=None,
        groups=config.moe.num_groups,
        tensor=config.mesh.tensor,
    )


def _is_its_table(saved: SavedRun, config: Config) -> bool:
    """Whether a checkpoint's experts are where the configuration's custom table puts them."""
    began = config_from_text(saved.meta["config"], "the checkpoint's configuration").placement
    return began == config.placement and saved.placement.ranks == config.mesh.expert


def check_state_memory(topology: Topology, program: TrainProgram) -> None:
    """Raises UserError for a training state that a device of the topology has no room for."""
    if topology.memory is None:
        return
    held = per_device(program.abstract_state, program.state_shardings)
    if held > topology.memory:
        slots = program.placement.num_slots // program.placement.ranks
        raise UserError(
            f"placement.topology gives a device {topology.memory:,} bytes of memory, but weights "
            f"and moments alone, with {slots} slots "
            f"a layer on each, take {held:,}: use more devices or fewer "
            f"placement.redundant_slots."
        )
