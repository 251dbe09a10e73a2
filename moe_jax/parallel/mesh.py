"""The device mesh. Call `use_devices` before anything else touches a device."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.parallel.collectives import AXES
from moe_jax.runtime.platform import platform_of


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data`, `expert` and `tensor` over `devices`, by default all. CPU devices
    beyond its size stay unused.

    Raises UserError if the mesh does not match the devices.
    """
    devices = jax.devices() if devices is None else devices
    simulated = platform_of(devices[0]).simulated
    if config.size > len(devices) or (config.size != len(devices) and not simulated):
        raise UserError(
            f"mesh.data={config.data} x mesh.expert={config.expert} x mesh.tensor={config.tensor} "
            f"needs {config.size} devices and "
            f"there are {len(devices)}: change the mesh, or set devices.simulate={config.size} to "
            f"try it on simulated CPU devices."
        )
    if simulated:
        grid = np.array(devices[: config.size]).reshape(config.data, config.expert, config.tensor)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.make_mesh(
        (config.data, config.expert, config.tensor),
        AXES,
        axis_types=(AxisType.Auto,) * 3,
        devices=devices,
    )
