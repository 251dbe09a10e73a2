"""The devices of this process: how many CPU devices are simulated, and the threads that they need.

JAX is imported only when one of these is called: the compile cache has settings that must come
first.
"""

from __future__ import annotations

import os

from moe_jax.config.schema import DevicesConfig, MeshConfig
from moe_jax.errors import UserError
from moe_jax.runtime import distributed


def use_devices(config: DevicesConfig, mesh: MeshConfig | None = None) -> None:
    """Simulates CPU devices if asked to; of several processes each its share, and without an
    accelerator its share of `mesh` in any case. Raises UserError if JAX already runs with another
    number of devices.
    """
    if not config.simulate:
        if distributed.process_count() > 1 and mesh is not None:
            start_devices(mesh, None)
        return
    import jax

    share = distributed.local_share(config.simulate, f"devices.simulate={config.simulate}")
    reserve_threads(share)
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", share)
    except RuntimeError:
        # JAX has started: its devices are what they are, and may well be those asked for.
        if jax.default_backend() != "cpu" or jax.device_count() < config.simulate:
            raise UserError(
                f"devices.simulate={config.simulate} comes too late: JAX already runs with "
                f"{jax.device_count()} "
                f"{jax.default_backend()} devices; start a new process."
            ) from None


def reserve_threads(devices: int) -> None:
    """Gives XLA:CPU enough threads for that many simulated devices to wait in, unless NPROC is set;
    before JAX starts.

    XLA sizes its pool by NPROC, by default one thread per core or device. A device may wait in
    several collectives of one program at a time, each on a thread. If no thread is left for another
    device, all of them wait without end (seen: docs/log.md). Three threads per device are one for
    each kind of group: along data, along expert, along both. More cost speed.
    """
    if devices > 1:
        os.environ.setdefault("NPROC", str(3 * devices))


def start_devices(mesh: MeshConfig, simulate: int | None) -> None:
    """Simulates as many CPU devices as asked for, or as the mesh needs if there is only the CPU, of
    several processes each its share; before JAX starts.
    """
    import jax

    if simulate is not None:
        use_devices(DevicesConfig(simulate=simulate))
        return
    share = distributed.local_share(mesh.size, f"the mesh {mesh.axes_text or 'of one device'}")
    if jax.config.jax_num_cpu_devices < share:  # type: ignore[attr-defined]
        split_cpu(share)
    reserve_threads(share)


def split_cpu(devices: int) -> None:
    """Splits the CPU into simulated devices, before JAX starts. An accelerator, if there is one,
    stays the default.
    """
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
