"""Compiled programs kept on disk, so that a model answers sooner the next time it is opened.

They go to $MOE_JAX_CACHE, by default moe-jax/ in the user's cache folder; an empty MOE_JAX_CACHE
turns this off. A program for a CPU is machine code, so each kind of CPU has its own folder. Needs
only the standard library until it is called.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

CACHE_VARIABLE = "MOE_JAX_CACHE"
SHORTEST = 0.2  # seconds of compiling from which a program is kept


def cache_root() -> Path | None:
    """The folder of all that is kept, or None."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    chosen = os.environ.get(CACHE_VARIABLE, Path(home) / "moe-jax")
    return Path(chosen) if chosen else None


def cache_folder() -> Path | None:
    """Where compiled programs go, or None."""
    root = cache_root()
    return None if root is None else root / _processor()


def _processor() -> str:
    """A name that differs for CPUs that do not run each other's code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    flags = next(
        (line for line in lines if line.startswith(("flags", "Features"))),
        lines[0] if lines else "",
    )
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def use_compile_cache() -> None:
    """Keeps compiled programs from now on."""
    folder = cache_folder()
    if folder is None:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
