"""Chips that are not there, to compile for: those of a TPU topology, from its compiler in libtpu.

    devices = tpu_devices("v5p:4x4x4")       # 64 devices that nothing can run on

JAX itself stays on the CPU. One process at a time may use libtpu on a machine, because it might
hold the chips; where there are none, ALLOW_MULTIPLE_LIBTPU_LOAD=1 lets several compile.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import jax
from jax.experimental import topologies
from packaging.requirements import Requirement

from moe_jax.errors import UserError

EXTRA = "pip install 'moe-jax[preflight]'"
LIBRARY = "TPU_LIBRARY_PATH"  # a libtpu.so elsewhere
SEVERAL = "ALLOW_MULTIPLE_LIBTPU_LOAD"
# What libtpu would otherwise ask the metadata server of a TPU host.
HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-128",
}


def tpu_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology such as `v5e:16x16`, in libtpu's order. Raises UserError where
    libtpu is missing, does not match jax, is in use, or does not know the topology.
    """
    check_libtpu()
    os.environ.update(HOST)  # what jax has put there where it found libtpu and no TPU is no use
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        if "lockfile" in reason:
            raise UserError(
                f"libtpu is in use by another process of this machine: wait for it, or set "
                f"{SEVERAL}=1 where the machine has no TPU."
            ) from error
        raise UserError(
            f"--topology {topology}: the TPU compiler does not know it ({reason}): write the "
            f"chips as v5p:4x4x4 or v5e:16x16."
        ) from error


def check_libtpu() -> None:
    """Raises UserError where the TPU compiler cannot be used, with the reason."""
    wanted, installed = wanted_libtpu(), libtpu_version()
    if installed is None:
        raise UserError(f"the TPU compiler is not installed (libtpu {wanted}): {EXTRA}.")
    if not Requirement(f"libtpu{wanted}").specifier.contains(installed, prereleases=True):
        raise UserError(
            f"libtpu {installed} does not match jax {jax.__version__}, which needs libtpu{wanted}: "
            f"{EXTRA}."
        )


def wanted_libtpu() -> str:
    """The versions of libtpu that the installed jax asks for, such as `==0.0.41.*`."""
    for line in importlib.metadata.requires("jax") or ():
        requirement = Requirement(line)
        if requirement.name == "libtpu":
            return str(requirement.specifier)
    return ""


def libtpu_version() -> str | None:
    """The version of the libtpu that would be loaded; None without one."""
    elsewhere = os.environ.get(LIBRARY)
    path = [str(Path(elsewhere).parent.parent)] if elsewhere else sys.path
    found = importlib.metadata.distributions(name="libtpu", path=path)
    return next((distribution.version for distribution in found), None)
