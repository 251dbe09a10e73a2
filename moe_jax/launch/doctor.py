"""`moe-jax doctor`: can this machine train, correctly, and how fast is its hardware?

It compares installed versions with those that the package asks for, runs the computation that a
known-bad jaxlib gets wrong, and tries every back end in tiny form (`probes.py`); on a Mac's GPU it
looks for the known faults of its plug-ins (`metal_probes.py`). What is only unavailable on this
machine is reported with its reason, and what the package works round with how. A bad version or a
wrong number is a problem, with the remedy.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from moe_jax.launch.probes import (
    PROBES,
    SIMULATED_DEVICES,
    WrongArithmetic,
    probe_against_numpy,
)
from moe_jax.runtime import metal
from moe_jax.runtime.devices import split_cpu, usable_cores, use_platform

if TYPE_CHECKING:
    from rich.table import Table

    from moe_jax.launch.metal_probes import KnownFault

EXAMINED_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "grain",
    "transformers",
    "tokenizers",
    "pydantic",
)
KNOWN_BAD_JAXLIB = {"0.10.2": "it computes wrong results on CPU under jit (jax issue 39103)"}
INSTALL_GOOD_JAX = "pip install 'jax>=0.10.1,!=0.10.2,<0.12' 'jaxlib>=0.10.1,!=0.10.2,<0.12'"


@dataclass
class Version:
    """A package: the installed version (None if there is none), the wanted ones, and the problem
    (empty if there is none).
    """

    name: str
    installed: str | None
    wanted: str
    problem: str


@dataclass
class ProbeResult:
    """A probe: `ok`, `unavailable`, `wrong`, or `avoided` for what is wrong and not used; and a
    short text (a measurement, or the reason).
    """

    name: str
    status: str
    text: str
    remedy: str = ""
    """What to do about a wrong number."""


@dataclass
class Examination:
    """The results of all checks. `problems` has one sentence per problem, with the remedy."""

    versions: list[Version]
    machine: dict[str, Any]
    probes: list[ProbeResult]
    problems: list[str] = field(default_factory=list)


def examine(platform_name: str | None = None) -> Examination:
    """Checks versions, devices and every probe, on this platform or that which commands would take;
    takes about ten seconds. Raises UserError for a platform that is not here.
    """
    versions = package_versions()
    problems = [version.problem for version in versions if version.problem]
    if any(
        version.installed is None
        for version in versions
        if version.name in ("jax", "jaxlib", "numpy")
    ):
        return Examination(versions, {}, [], problems)
    plugin = metal.installed_plugin() if metal.is_mac() else None
    if plugin is not None and (problem := metal.plugin_problem(plugin)) is not None:
        problems.append(problem)
        platform_name = platform_name or "cpu"
    use_platform(platform_name)
    split_cpu(SIMULATED_DEVICES)
    try:
        machine = describe_machine()
    except Exception as error:  # whatever a plugin of jax raises: nothing works without a device
        problems.append(
            f"jax finds no device ({_reason(error)}): install moe-jax with the extra for it, or "
            f"set JAX_PLATFORMS=cpu."
        )
        return Examination(versions, {}, [], problems)
    probes = [run_probe("jit arithmetic", probe_against_numpy), *_probes_here()]
    problems += [
        f"{probe.name} computes wrong numbers: {probe.text}; {probe.remedy or INSTALL_GOOD_JAX}."
        for probe in probes
        if probe.status == "wrong"
    ]
    return Examination(versions, machine, probes, problems)


def _probes_here() -> list[ProbeResult]:
    """Every probe of the default platform."""
    from moe_jax.launch.metal_probes import KNOWN_FAULTS
    from moe_jax.runtime.platform import default_platform

    if default_platform().name != "metal":
        return [run_probe(name, probe) for name, probe in PROBES]
    # A Mac has no collective, and what else is in PROBES and computes is tried by these.
    rates = [(name, probe) for name, probe in PROBES if name.endswith("rate")]
    return [_look_for(fault) for fault in KNOWN_FAULTS] + [run_probe(*rate) for rate in rates]


def _look_for(fault: KnownFault) -> ProbeResult:
    """Whether a fault is here, and what comes of it."""
    result = run_probe(fault.name, fault.probe)
    if result.status == "ok":
        return result
    if fault.workaround:
        text = f"{result.text}; {fault.workaround}"
        return ProbeResult(fault.name, "avoided", text)
    return ProbeResult(fault.name, "wrong", result.text, fault.remedy)


def package_versions() -> list[Version]:
    """Installed versions, each with the verdict on it."""
    wanted = _requirements()
    rows = [_python_version()]
    for name in EXAMINED_PACKAGES:
        requirement = wanted.get(name)
        try:
            installed: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        rows.append(judge_version(name, installed, requirement))
    plugins = (
        (one.package, metal.installed_version(one.package)) for one in metal.PLUGINS.values()
    )
    return rows + [Version(name, found, "", "") for name, found in plugins if found is not None]


def judge_version(name: str, installed: str | None, requirement: Requirement | None) -> Version:
    """The verdict on one package: missing, known bad, outside the tested range, or fine."""
    specifier = requirement.specifier if requirement else None
    problem = ""
    if installed is None:
        problem = f"{name} is not installed: pip install '{name}{specifier or ''}'."
    elif name == "jaxlib" and installed in KNOWN_BAD_JAXLIB:
        problem = (
            f"jaxlib {installed} must not be used, {KNOWN_BAD_JAXLIB[installed]}: "
            f"{INSTALL_GOOD_JAX}."
        )
    elif specifier is not None and not specifier.contains(installed, prereleases=True):
        problem = f"{name} {installed} is outside {specifier}: pip install '{name}{specifier}'."
    return Version(name, installed, str(specifier or ""), problem)


def _python_version() -> Version:
    installed = platform.python_version()
    too_old = tuple(map(int, platform.python_version_tuple()[:2])) < (3, 11)
    return Version(
        "python",
        installed,
        ">=3.11",
        f"Python {installed} is too old: use 3.11 or later." if too_old else "",
    )


def _requirements() -> dict[str, Requirement]:
    """The package's own requirements: from its metadata or, in a checkout that is not installed,
    from pyproject.toml.
    """
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    if pyproject.is_file():
        lines = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires("moe-jax") or []
    return {
        requirement.name: requirement
        for requirement in map(Requirement, lines)
        if requirement.marker is None
    }


def run_probe(name: str, probe: Any) -> ProbeResult:
    """Tries one thing. An exception is the answer, not a failure of doctor."""
    try:
        return ProbeResult(name, "ok", probe())
    except WrongArithmetic as error:
        return ProbeResult(name, "wrong", str(error))
    except Exception as error:  # back ends refuse in many ways, and doctor shows every one
        return ProbeResult(name, "unavailable", _reason(error))


def _reason(error: Exception) -> str:
    """An exception's type and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:160] if lines else type(error).__name__


def describe_machine() -> dict[str, Any]:
    """Platform, devices, cores and memory."""
    import jax

    from moe_jax.runtime.platform import default_platform, platform_of

    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    simulated = platform_of(devices[0]).simulated
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "macos": platform.mac_ver()[0] or None,
        "platform": devices[0].platform,
        "programs_for": default_platform().name,
        "devices": 1 if simulated else len(devices),
        "device_kinds": kinds,
        "device_memory_bytes": [
            (device.memory_stats() or {}).get("bytes_limit")
            for device in ([] if simulated else devices)
        ],
        "simulated_devices": SIMULATED_DEVICES,
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def print_examination(examination: Examination, *, as_json: bool) -> None:
    """Prints to stdout, as JSON or as tables followed by the problems."""
    if as_json:
        print(
            json.dumps(
                {"ok": not examination.problems, **dataclasses.asdict(examination)}, indent=2
            )
        )
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    for table in _tables(examination):
        if not console.is_terminal:
            table.box = None
        if table.row_count:
            console.print(table)
    for problem in examination.problems:
        console.print(f"[red]problem[/]: {escape(problem)}", soft_wrap=True)
    if not examination.problems:
        console.print("[green]Nothing is wrong.[/]")


def _tables(examination: Examination) -> list[Table]:
    """Versions, the machine and the probes."""
    from rich.markup import escape
    from rich.table import Table

    versions = Table("package", "installed", "wanted", "", title="Versions", title_justify="left")
    for version in examination.versions:
        versions.add_row(
            version.name,
            version.installed or "missing",
            version.wanted,
            "[red]bad[/]" if version.problem else "[green]ok[/]",
        )
    machine = Table("what", "value", title="Machine", title_justify="left")
    for key, value in examination.machine.items():
        machine.add_row(
            key.replace("_", " ").replace(" bytes", ""), escape(_machine_text(key, value))
        )
    probes = Table("probe", "", "result", title="What works here", title_justify="left")
    colors = {"ok": "green", "unavailable": "yellow", "avoided": "yellow", "wrong": "red"}
    for probe in examination.probes:
        probes.add_row(probe.name, f"[{colors[probe.status]}]{probe.status}[/]", escape(probe.text))
    return [versions, machine, probes]


def _machine_text(key: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_machine_text(key, item) for item in value) or "-"
    return (
        f"{value / 2**30:.1f} GiB" if key.endswith("_bytes") and value is not None else str(value)
    )
