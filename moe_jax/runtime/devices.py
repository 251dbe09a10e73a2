"""The devices of this process: their platform, how many CPU devices are simulated, and the threads
that they need.

JAX is imported only when one of these is called: the compile cache has settings that must come
first.
"""

from __future__ import annotations

import importlib.util
import os

from moe_jax.config.schema import DevicesConfig, MeshConfig
from moe_jax.errors import UserError
from moe_jax.runtime import distributed, metal
from moe_jax.utils.units import one_of_these

# Platforms by what --platform calls them, each with the modules of which one must be installed.
_MODULES: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin"),
    "rocm": ("jax_rocm7_plugin", "jax_rocm60_plugin"),
    "tpu": ("libtpu",),
    "metal": (),
    metal.METAL_ON_CPU: (),
}


def check_platform(name: str | None) -> None:
    """Raises UserError for what is no platform."""
    if name is not None and name not in _MODULES:
        raise UserError(f"--platform {name!r} is unknown: choose {one_of_these(list(_MODULES))}.")


def use_platform(name: str | None) -> None:
    """Computes on this platform, before JAX starts; for None on a Mac's GPU if there is one, and
    else where JAX would. Raises UserError where the platform is not there.
    """
    check_platform(name)
    if name is None and metal.found():
        name = "metal"
    plugin = metal.require() if name == "metal" else name
    modules = () if name is None else _MODULES[name]
    if modules and not any(map(importlib.util.find_spec, modules)):
        extra = "" if name == "rocm" else f": pip install 'moe-jax[{name}]'"
        raise UserError(f"--platform {name}: JAX has no plug-in for it{extra}.")
    import jax

    from moe_jax.runtime import platform

    platform.stand_in(name if name == metal.METAL_ON_CPU else None)
    if name == metal.METAL_ON_CPU or name == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif plugin is not None:
        jax.config.update("jax_platforms", f"{plugin},cpu")


def check_one_device(devices: int, what: str) -> None:
    """Raises UserError for several devices where the platform has one; `what` asks for them."""
    if devices == 1:
        return
    import jax

    from moe_jax.runtime import platform

    chosen = (jax.config.jax_platforms or "").partition(",")[0]  # type: ignore[attr-defined]
    if platform.stands_in() or chosen in metal.PLUGINS:
        raise UserError(
            f"{what} asks for {devices} devices and a Mac has one GPU: use a mesh of one device, "
            f"or --platform cpu for simulated ones."
        )


def use_devices(config: DevicesConfig, mesh: MeshConfig | None = None) -> None:
    """Simulates CPU devices if asked to; of several processes each its share, and without an
    accelerator its share of `mesh` in any case. Raises UserError if JAX already runs with another
    number of devices.
    """
    if config.simulate:
        check_one_device(config.simulate, f"devices.simulate={config.simulate}")
    elif mesh is not None:
        check_one_device(mesh.size, f"the mesh {mesh.axes_text}")
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


def others_environment() -> dict[str, str]:
    """The environment for a process of another program, which chooses its own number of threads."""
    return {name: value for name, value in os.environ.items() if name != "NPROC"}


def start_devices(mesh: MeshConfig, simulate: int | None) -> None:
    """Simulates as many CPU devices as asked for, or as the mesh needs if there is only the CPU, of
    several processes each its share; before JAX starts.
    """
    import jax

    check_one_device(mesh.size, f"--mesh {mesh.axes_text}")
    if simulate is not None:
        check_one_device(simulate, f"--simulate {simulate}")
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


def usable_cores() -> int:
    """Cores that this process may compute on, at least one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
