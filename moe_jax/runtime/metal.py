"""A Mac's GPU: which plug-in of JAX drives it, and whether this machine can use it.

There are several, each with a name of its own for the platform. What they can do is a record in
platform.py; what is wrong with one is found by `moe-jax doctor` (launch/metal_probes.py). Needs
only the standard library: JAX must be told its platforms before it starts.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from typing import NamedTuple

from moe_jax.errors import UserError

METAL_ON_CPU = "metal-on-cpu"
INSTALL = "pip install 'moe-jax[mac]'"


class Plugin(NamedTuple):
    """A plug-in for Metal."""

    package: str
    macos: int  # oldest version


# By the platform's name in JAX, in the order in which they are taken.
PLUGINS = {
    "mps": Plugin("jax-mps", 14),
    "metal": Plugin("metaljax", 14),
    "mtl": Plugin("metal-pjrt-plugin", 26),
    "METAL": Plugin("jax-metal", 14),
}


def is_mac() -> bool:
    """Whether this is a Mac with Apple silicon."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def gpu_memory() -> int:
    """Bytes of this Mac's memory that its GPU may use."""
    return gpu_share(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def gpu_share(memory: int) -> int:
    """Bytes of a Mac's memory that its GPU may use: by Apple's rule two thirds of up to 36 GiB, and
    three quarters of more.
    """
    return memory * 2 // 3 if memory <= 36 * 2**30 else memory * 3 // 4


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_plugin() -> str | None:
    """The platform of the plug-in that is installed, or None."""
    return next(
        (name for name, plugin in PLUGINS.items() if installed_version(plugin.package)), None
    )


def found() -> bool:
    """Whether a command computes on Metal if nobody says otherwise: on a Mac with a plug-in.

    Some plug-ins leave the CPU JAX's default, so that asking JAX would not do.
    """
    return is_mac() and not os.environ.get("JAX_PLATFORMS") and installed_plugin() is not None


def require() -> str:
    """The name of Metal's platform in JAX. Raises UserError, one sentence, where there is none."""
    if not is_mac():
        raise UserError(
            f"--platform metal needs a Mac with Apple silicon and this is "
            f"{platform.system()} on {platform.machine()}: use --platform {METAL_ON_CPU} to run "
            f"the same programs on the CPU."
        )
    name = installed_plugin()
    if name is None:
        raise UserError(f"--platform metal: no plug-in for Metal is installed: {INSTALL}.")
    if (problem := plugin_problem(name)) is not None:
        raise UserError(f"--platform metal: {problem}")
    return name


def plugin_problem(name: str) -> str | None:
    """Why the plug-in of this platform cannot be used here, and the remedy; None if it can."""
    package, oldest = PLUGINS[name]
    version = installed_version(package)
    macos = platform.mac_ver()[0]
    if macos and int(macos.partition(".")[0]) < oldest:
        return (
            f"macOS {macos} is too old for {package} {version}: update to macOS {oldest} or later, "
            f"or use --platform cpu."
        )
    jax = installed_version("jax")
    wanted = _jax_minor(package, version or "")
    if jax is not None and wanted is not None and _minor(jax) != wanted:
        python = ".".join(platform.python_version_tuple()[:2])
        newer = " in Python 3.12 or later" if wanted == (0, 11) and python == "3.11" else ""
        return (
            f"{package} {version} is made for jax {wanted[0]}.{wanted[1]} and jax {jax} is "
            f"installed: {INSTALL}{newer} brings the two that match."
        )
    return None


def _minor(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def _jax_minor(package: str, version: str) -> tuple[int, int] | None:
    """The jax that a plug-in is made for. Three of them have its minor version in their own."""
    if package == "jax-metal":
        return (0, 5)
    return None if package == "metal-pjrt-plugin" else _minor(version)
