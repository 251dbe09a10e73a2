"""The device mesh. Call `use_devices` before anything else touches a device."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from moe_jax.config.schema import DevicesConfig, MeshConfig
from moe_jax.errors import UserError
from moe_jax.parallel.collectives import AXES


def use_devices(config: DevicesConfig) -> None:
    """Simulates CPU devices if asked to. Raises UserError if JAX already runs with another number of devices."""
    if not config.simulate:
        return
    reserve_threads(config.simulate)
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.simulate)
    except RuntimeError:
        # JAX has started: its devices are what they are, and may well be those asked for.
        if jax.default_backend() != "cpu" or jax.device_count() < config.simulate:
            raise UserError(
                f"devices.simulate={config.simulate} comes too late: JAX already runs with {jax.device_count()} "
                f"{jax.default_backend()} devices; start a new process."
            ) from None


def reserve_threads(devices: int) -> None:
    """Gives XLA:CPU threads enough for that many simulated devices to wait in, unless NPROC is set; before JAX starts.

    XLA sizes its pool by NPROC, by default a thread for each core or device. A device may wait in several collectives of
    one program at a time, each on a thread; where that leaves another none, all wait for ever (seen: docs/log.md). Three a
    device are one for each kind of group: along data, along expert, along both. More cost speed.
    """
    if devices > 1:
        os.environ.setdefault("NPROC", str(3 * devices))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data`, `expert` and `tensor` over `devices`, by default all; CPU devices beyond its size stay unused.

    Raises UserError if the mesh does not match the devices.
    """
    devices = jax.devices() if devices is None else devices
    simulated = devices[0].platform == "cpu"
    if config.size > len(devices) or (config.size != len(devices) and not simulated):
        raise UserError(
            f"mesh.data={config.data} x mesh.expert={config.expert} x mesh.tensor={config.tensor} needs {config.size} devices and "
            f"there are {len(devices)}: change the mesh, or set devices.simulate={config.size} to try it on simulated CPU devices."
        )
    if simulated:
        grid = np.array(devices[: config.size]).reshape(config.data, config.expert, config.tensor)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.make_mesh((config.data, config.expert, config.tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
