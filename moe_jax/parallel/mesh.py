"""The device mesh. Call `use_devices` before anything else touches a device."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.parallel.collectives import AXES
from moe_jax.runtime.platform import platform_of


def first_devices(count: int) -> list[jax.Device]:
    """`count` of JAX's devices (all, if there are fewer), equally many of each process, in the
    order of processes.
    """
    processes = jax.process_count()
    if processes == 1 or count % processes or count >= jax.device_count():
        return jax.devices()[:count]
    by_process: list[list[jax.Device]] = [[] for _ in range(processes)]
    for device in jax.devices():
        by_process[device.process_index].append(device)
    return [device for devices in by_process for device in devices[: count // processes]]


def make_mesh(config: MeshConfig, given: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data`, `expert` and `tensor` over the `given` devices, by default all. CPU
    devices beyond its size stay unused.

    Raises UserError if the mesh does not match the devices.
    """
    devices = jax.devices() if given is None else given
    simulated = platform_of(devices[0]).simulated
    if config.size > len(devices) or (config.size != len(devices) and not simulated):
        raise UserError(
            f"mesh.data={config.data} x mesh.expert={config.expert} x mesh.tensor={config.tensor} "
            f"needs {config.size} devices and "
            f"there are {len(devices)}: change the mesh, or set devices.simulate={config.size} to "
            f"try it on simulated CPU devices."
        )
    if simulated:
        chosen = first_devices(config.size) if given is None else devices[: config.size]
        grid = np.array(chosen).reshape(config.data, config.expert, config.tensor)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
    # Two axes may share a dim of a TPU's torus, as data 8 x expert 8 must on 4 x 4 x 4 chips, which
    # `jax.make_mesh` refuses.
    grid = create_device_mesh(
        (config.data, config.expert, config.tensor), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
