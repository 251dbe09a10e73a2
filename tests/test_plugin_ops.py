"""scripts/plugin_ops.py: what it reads from a library, and the tables that it wrote."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import pytest

from tests.support import ROOT

TEXT, STRINGS = 0x1000, 0x2000  # where the parts of the library below lie
RETURN = 0xD65F03C0
TABLES = sorted((ROOT / "scripts" / "plugins").glob("*.json"))


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import macho
    import plugin_ops

    return macho, plugin_ops


class Assembler:
    """A library of a few functions, as the linker would have written it."""

    def __init__(self, names: Sequence[str]):
        self.words: list[int] = []
        self.starts: list[int] = []
        self.strings = b""
        self.at = {}
        for name in names:
            self.at[name] = STRINGS + len(self.strings)
            self.strings += name.encode() + b"\0"

    @property
    def here(self) -> int:
        return TEXT + 4 * len(self.words)

    def function(self) -> int:
        self.starts.append(self.here)
        return self.here

    def point(self, name: str) -> None:
        """adrp and add: the address of a string."""
        pages = (self.at[name] >> 12) - (self.here >> 12)
        self.words.append(0x90000000 | (pages & 3) << 29 | (pages >> 2) << 5)
        self.words.append(0x91000000 | (self.at[name] & 0xFFF) << 10)

    def call(self, function: int) -> None:
        self.words.append(0x94000000 | ((function - self.here) >> 2) & 0x3FFFFFF)

    def build(self, value: bytes) -> None:
        """movz and three movk: eight bytes as a number."""
        number = int.from_bytes(value, "little")
        for part in range(4):
            kind = 0xF2800000 if part else 0xD2800000
            self.words.append(kind | part << 21 | (number >> 16 * part & 0xFFFF) << 5)

    def link(self) -> bytes:
        text = struct.pack(f"<{len(self.words)}I", *self.words)
        starts, before = b"", 0
        for start in self.starts:
            step = start - before
            before = start
            while step > 127:
                starts += bytes([step & 127 | 128])
                step >>= 7
            starts += bytes([step])
        sections = ((b"__text", TEXT, text), (b"__cstring", STRINGS, self.strings))
        heads = b"".join(
            struct.pack("<16s16s2QI28x", name, b"__TEXT", at, len(part), at)
            for name, at, part in sections
        )
        segment = struct.pack("<2I16s4Q4I", 0x19, 72 + 160, b"__TEXT", 0, 0, 0, 0, 0, 0, 2, 0)
        ends = STRINGS + len(self.strings)
        commands = segment + heads + struct.pack("<4I", 0x26, 16, ends, len(starts) + 1)
        head = struct.pack("<8I", 0xFEEDFACF, 0x0100000C, 0, 6, 2, len(commands), 0, 0)
        content = (head + commands).ljust(TEXT, b"\0") + text
        return content.ljust(STRINGS, b"\0") + self.strings + starts + b"\0"


def test_registered_names_are_those_that_one_function_is_called_for(
    scripts: tuple[Any, Any],
) -> None:
    macho, plugin_ops = scripts
    names = ["stablehlo.add", "stablehlo.sort", "stablehlo.infeed", "chlo.erf", "mps.rope"]
    made = Assembler(names)
    insert, other = made.function(), None
    made.words.append(RETURN)
    other = made.function()
    made.words.append(RETURN)
    made.function()  # registers two operations
    for name in names[:2]:
        made.point(name)
        made.call(insert)
    made.function()  # registers one more
    made.point("chlo.erf")
    made.call(insert)
    made.function()  # only speaks of operations
    made.point("stablehlo.infeed")
    made.point("mps.rope")
    made.call(other)
    operations, targets, _ = plugin_ops.read_mps(macho.Library(made.link()))
    assert operations == {"stablehlo.add", "stablehlo.sort", "chlo.erf"}
    assert targets == {"mps.rope"}


def test_names_that_code_compares_with_are_found(scripts: tuple[Any, Any]) -> None:
    made = Assembler(["unused"])
    compares = made.function()
    made.build(b"stablehl")
    made.build(b"ehlo.add")
    made.words.append(RETURN)
    nothing = made.function()
    made.words.append(RETURN)
    library = scripts[0].Library(made.link())
    assert library.compares_with(compares, "stablehlo.add")
    assert not library.compares_with(compares, "stablehlo.abs")
    assert not library.compares_with(nothing, "stablehlo.add")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_hold_names_and_say_where_they_are_from(path: Any) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    assert path.stem == f"{table['plugin']}-{table['version']}"
    assert len(table["wheel"]["sha256"]) == 64 and table["platform"]
    assert table["obtained"].keys() == {"ops", "stablehlo", "dtypes"}
    assert "f64" not in table["dtypes"]
    assert all(limit["source"] and limit["what"] for limit in table["limits"])
    if table["ops"] is not None:
        assert table["ops"] == sorted(set(table["ops"])) and len(table["ops"]) > 60
        assert table["stablehlo"]["oldest"] == "0.9.0"


def test_tables_differ_where_the_plugins_do() -> None:
    operations = {
        path.stem: set(json.loads(path.read_text(encoding="utf-8"))["ops"] or ()) for path in TABLES
    }
    mps, metaljax = operations["jax-mps-0.10.11"], operations["metaljax-0.11.9"]
    assert not {f"stablehlo.{x}" for x in ("all_gather", "all_to_all", "reduce_scatter")} & mps
    assert {f"stablehlo.{x}" for x in ("all_gather", "all_to_all", "reduce_scatter")} <= metaljax
    assert {"stablehlo.while", "stablehlo.dot_general", "stablehlo.scatter"} <= mps & metaljax
