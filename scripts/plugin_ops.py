"""Writes what a Metal plug-in can run into scripts/plugins/, read from its wheel and never run.

    python scripts/plugin_ops.py jax-mps                     # the newest release for this Python
    python scripts/plugin_ops.py metaljax --python 3.12 --version 0.11.9
    python scripts/plugin_ops.py jax-mps --wheel jax_mps-0.10.11-py3-none-macosx_14_0_arm64.whl

A table holds names and versions alone: the operations that the plug-in registers, the targets of
custom calls that it knows, the StableHLO versions that it reads, its types, and limits of single
operations; `obtained` says how each came about. Every plug-in is linked with all of StableHLO, so a
name that merely occurs in the library means nothing: what counts is the code that registers or
compares it (macho.py). Operations are read anew from each release; `LIMITS` and `DTYPES` are kept
by hand, with their sources, and are to be read again by whoever adds a release.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from macho import Library

TABLES = Path(__file__).resolve().parent / "plugins"
TARGETS = (
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
    "annotate_device_placement",
    "mhlo.topk",
    "mhlo.erf",
    "mhlo.erf_inv",
    "mhlo.ragged_dot",
    "ApproxTopK",
    "TopK",
)
"""Targets of custom calls that jax emits by itself where no back end asks for others."""
STRUCTURE = ("builtin.module", "func.func", "func.return", "stablehlo.return")
"""What programs have and no plug-in needs to register: it runs nothing."""
FEWEST = {f"stablehlo.{name}" for name in ("add", "dot_general", "gather", "reduce", "while")}
OTHER_FORM = "its code has another form than in earlier releases, read it again"
ATTRIBUTES = {"sdy.sharding", "mhlo.num_partitions"}  # which code compares like operations
MLX_DTYPES = (
    *("i1", "i8", "i16", "i32", "i64", "ui8", "ui16", "ui32", "ui64"),
    *("f16", "bf16", "f32", "complex<f32>"),
)
EMULATED = ("i4", "ui4", "f8E4M3FN", "f8E5M2", "f8E4M3B11FNUZ", "f8E4M3FNUZ", "f8E5M2FNUZ")
DTYPES = {
    "jax-mps": (MLX_DTYPES, "README in the wheel: no f64, no type of fewer than 8 bits, no f8"),
    "metaljax": (MLX_DTYPES + EMULATED, "README in the wheel: no f64; int4 and f8 are emulated"),
    "jax-metal": (
        tuple(kind for kind in MLX_DTYPES if not kind.startswith("complex")),
        "Metal has no f64; complex types were never documented",
    ),
    "metal-pjrt-plugin": (MLX_DTYPES, "README in the wheel: f32, f16, bf16 and integers"),
}
HALF_DOT = {
    "op": "stablehlo.dot_general",
    "rule": "half_dot_result",
    "what": "a product of bf16 or f16 comes back in that type whatever type is asked for",
}
LIMITS: dict[str, list[dict[str, Any]]] = {
    "jax-mps": [
        HALF_DOT | {"source": "the public source of 0.10.11"},
        {
            "op": "stablehlo.scatter",
            "rule": "arrays",
            "most": 1,
            "what": "scatters one array at a time",
            "source": "wheel: a message of its scatter handler",
        },
        {
            "op": "stablehlo.scatter",
            "rule": "drops",
            "what": "writes somewhere what is out of bounds",
            "source": "issue 240 of jax-mps",
        },
        {
            "op": "stablehlo.reduce",
            "rule": "body",
            "allowed": ["add", "multiply", "minimum", "maximum", "and:i1", "or:i1", "arg"],
            "what": "reduces by add, multiply, minimum, maximum, and, or (of i1), or an argmax",
            "source": "wheel: messages of its reduce handler",
        },
        {
            "op": "stablehlo.sort",
            "rule": "keys",
            "most": 1,
            "what": "sorts by the first key alone",
            "source": "the public source of 0.10.11",
        },
    ],
    "metaljax": [],
    "jax-metal": [],
    "metal-pjrt-plugin": [],
}


def main() -> None:
    """Reads the command line and writes one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("plugin", choices=sorted(LIMITS))
    parser.add_argument("--version", help="release; by default the newest")
    parser.add_argument("--python", default="3.11", help="version of Python that it must fit")
    parser.add_argument("--wheel", type=Path, help="a wheel that is here already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or download(
            options.plugin, options.version, options.python, Path(folder)
        )
        table = read_wheel(options.plugin, wheel)
    TABLES.mkdir(exist_ok=True)
    target = TABLES / f"{table['plugin']}-{table['version']}.json"
    target.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    operations = "no list of" if table["ops"] is None else len(table["ops"])
    print(f"{target}: {operations} operations, StableHLO up to {table['stablehlo']['newest']}")


def download(plugin: str, version: str | None, python: str, folder: Path) -> Path:
    """The plug-in's wheel for macOS from the package index."""
    wanted = plugin if version is None else f"{plugin}=={version}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--platform", "macosx_14_0_arm64", "--python-version", python, "-d", str(folder)]
    if subprocess.run([*command, wanted], check=False).returncode:
        print(
            f"{wanted} has no wheel for macOS and Python {python} on the package index: name "
            f"another --version or --python.",
            file=sys.stderr,
        )
        sys.exit(2)
    return next(folder.glob("*.whl"))


def read_wheel(plugin: str, wheel: Path) -> dict[str, Any]:
    """The table of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(
            archive.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
        )
        sources = "\n".join(
            archive.read(name).decode("utf-8", "replace") for name in names if name.endswith(".py")
        )
        library_name = _library_name(names)
        library = None if library_name is None else Library(archive.read(library_name))
    dtypes, dtypes_from = DTYPES[plugin]
    operations: set[str] | None = None
    targets: set[str] | None = None
    how = "the wheel holds no library"
    if library is not None:
        operations, targets, how = READERS[plugin](library)
        if FEWEST - operations:
            raise ValueError(f"{sorted(FEWEST - operations)} are not registered: {OTHER_FORM}")
        operations.update(STRUCTURE)
    shardy = _knows_shardy(operations, sources)
    if operations is not None and shardy:
        operations.add("sdy.mesh")
    return {
        "plugin": plugin,
        "version": metadata["Version"],
        "platform": _platform(sources),
        "wheel": {"name": wheel.name, "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()},
        "requires": {
            "python": metadata["Requires-Python"],
            "jax": _requirement(metadata.get_all("Requires-Dist") or [], "jax"),
        },
        "stablehlo": stablehlo_versions(library),
        "shardy": shardy,
        "ops": None if operations is None else sorted(operations - ATTRIBUTES),
        "custom_calls": None if targets is None else sorted(targets),
        "dtypes": list(dtypes),
        "limits": LIMITS[plugin],
        "obtained": {
            "ops": how,
            "stablehlo": "constants of the function that converts between versions of VHLO",
            "dtypes": dtypes_from,
        },
    }


def stablehlo_versions(library: Library | None) -> dict[str, str | None]:
    """The oldest and the newest version of StableHLO that a library reads, without the patch."""
    if library is None:
        return {"oldest": None, "newest": None}
    pairs = {
        pair
        for function in library.users_of(" is greater than current version ")
        for pair in library.pairs_loaded(function)
        if pair != (1, 2) and 0 <= pair[0] < 10 and 0 < pair[1] < 1000  # (1, 2) orders registers
    }
    if len(pairs) < 2:
        raise ValueError(f"no versions of StableHLO in the library: {OTHER_FORM}")
    return {
        "oldest": "{}.{}.0".format(*min(pairs)),
        "newest": "{}.{}.0".format(*max(pairs)),
    }


def read_mps(library: Library) -> tuple[set[str], set[str], str]:
    """jax-mps: functions that call one function once per name fill its table of handlers."""
    used = library.names_used()
    calls = library.calls(set(used))
    elsewhere = calls.pop(-1, Counter())
    callers: dict[int, set[int]] = defaultdict(set)
    for function, called in calls.items():
        for callee in called:
            callers[callee].add(function)
    registered: set[str] = set()
    for callee, functions in callers.items():
        once_per_name = all(calls[f][callee] == len(used[f]) for f in functions)
        own = library.sections["__text"].holds(callee) and callee not in elsewhere
        found = set().union(*(used[f] for f in functions))
        if own and once_per_name and len(found) > len(registered):
            registered = found
    handler = max(used, key=lambda f: sum(name.startswith("mps.") for name in used[f]))
    targets = {name for name in used[handler] if name.startswith(("mps.", "mhlo."))}
    targets |= {name for name in TARGETS if library.mentions(handler, name)}
    return registered, targets, "wheel: functions that call one function once per name"


def read_metaljax(library: Library) -> tuple[set[str], set[str], str]:
    """metaljax: its table of opcodes, and the names that its lowering compares with."""
    lowering = _functions(library, "Lowering11LowerOpImplEPN4mlir9OperationE")
    calls = _functions(library, "Lowering15LowerCustomCallEPN4mlir9OperationE")
    candidates = set(library.names.values())
    found = {name for name in library.table("8kOpNames") if name in candidates}
    used = library.names_used()
    for function in lowering:
        found |= used.get(function, set())
        found |= {name for name in candidates if library.compares_with(function, name)}
    targets = {name for name in TARGETS for f in calls if library.mentions(f, name)}
    how = "wheel: the opcode table, and names that the lowering of an operation compares with"
    return {name for name in found if not name.startswith(("mhlo.", "mps."))}, targets, how


def read_apple(library: Library) -> tuple[set[str], set[str], str]:
    """jax-metal: roots of its patterns from MHLO, which it converts StableHLO to."""
    used = library.names_used()
    pattern = re.compile(r"mlir3mps.*(populate|17RewritePatternSet3add|RewritePattern6create)")
    roots = {
        name
        for function, names in used.items()
        if pattern.search(library.symbols.get(function, ""))
        or "RewritePatternSet3addIJNS_3mps" in library.symbols.get(function, "")
        or "RewritePattern6createINS_3mps" in library.symbols.get(function, "")
        for name in names
    }
    operations = {name.replace("mhlo.", "stablehlo.") for name in roots if "mps." not in name}
    calls = _functions(library, "CustomCallConverter15matchAndRewrite")
    targets = {name for name in TARGETS for f in calls if library.mentions(f, name)}
    return operations | {"func.call"}, targets, "wheel: roots of its conversion patterns"


READERS = {"jax-mps": read_mps, "metaljax": read_metaljax, "jax-metal": read_apple}


def _functions(library: Library, symbol: str) -> list[int]:
    text = library.sections["__text"]
    found = [at for at, name in library.symbols.items() if symbol in name and text.holds(at)]
    if not found:
        raise ValueError(f"the library has no function {symbol}: {OTHER_FORM}")
    return found


def _library_name(names: list[str]) -> str | None:
    plugins = [name for name in names if name.endswith(".dylib") and "pjrt" in name]
    return plugins[0] if plugins else None


def _platform(sources: str) -> str:
    found = re.search(r"""register_plugin\(\s*["'](\w+)["']""", sources)
    found = found or re.search(r"""^PLATFORM = ["'](\w+)["']""", sources, re.MULTILINE)
    if found is None:
        raise ValueError("the wheel does not say under which name it registers")
    return found.group(1)


def _knows_shardy(operations: set[str] | None, sources: str) -> bool:
    """Whether programs come with Shardy's annotations: not where the plug-in turns Shardy off."""
    turned_off = re.search(r"""["']jax_use_shardy_partitioner["'],\s*False""", sources)
    return not turned_off and any(name.startswith("sdy.") for name in operations or ())


def _requirement(lines: list[str], package: str) -> str | None:
    for line in lines:
        found = re.fullmatch(rf"{package}(?![\w-])\s*\(?([^;)]*)\)?.*", line)
        if found:
            return found.group(1).strip()
    return None


if __name__ == "__main__":
    main()
