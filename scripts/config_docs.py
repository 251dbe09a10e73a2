"""Writes docs/configuration.md from the types in moe_jax/config/: python scripts/config_docs.py
[--check]

With --check nothing is written, and the exit code is 1 where the file is not up to date.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moe_jax.config.fields import bounds_text
from moe_jax.config.load import dump_value, field_types, type_text
from moe_jax.config.schema import Config

TARGET = ROOT / "docs" / "configuration.md"

OPENING = """# Configuration

Written by `make docs` from the types in `moe_jax/config/`; change them, not this file.

A configuration is a YAML file of sections. Every key has a default, so a file holds only what
differs. `base: other.yaml` at its top starts from another file (its path is relative to this one;
one level, a base has no base of its own). `--set section.key=value` on the command line comes last
and may be repeated; the value is read as YAML, that of a text as it is typed (quotes keep spaces at
its ends). Relative paths in a file are relative to its folder,
those of `--set` to the working directory; `~` is the home folder:

```bash
moe-jax train configs/tiny.yaml --set train.steps=50 --set 'moe.dense_layers=[0, 2]'
```

Unknown keys, values of another type or out of range, and combinations that cannot work are refused
with one sentence before anything is compiled or written. Numbers are read as in YAML 1.2: `3e-4` is
a number, `no` is text. A run keeps its whole resolved configuration in `config.yaml`.
"""


def render() -> str:
    """The whole document."""
    return OPENING + "".join(_section(Config, "Top level"))


def _section(section: type, title: str) -> list[str]:
    """A heading, the section's purpose and a table of its keys; then the sections inside it."""
    fields = dataclasses.fields(section)
    hints = field_types(section)
    rows, inner = [], []
    for field in fields:
        if dataclasses.is_dataclass(hints[field.name]):
            inner.append(field.name)
            continue
        bounds = bounds_text(field.metadata)
        kind = type_text(hints[field.name]) + (f", {bounds}" if bounds else "")
        rows.append(
            f"| `{field.name}` | {kind} | `{dump_value(field.default)}` | "
            f"{_cell(field.metadata['help'])} |\n"
        )
    parts = [f"\n## {title}\n\n{_cell(section.__doc__ or '')}\n\n"]
    if rows:
        parts += ["| key | value | default | meaning |\n|---|---|---|---|\n", *rows]
    for name in inner:
        prefix = section.SECTION  # type: ignore[attr-defined]
        parts += _section(hints[name], f"`{prefix}{name}`")
    return parts


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Writes or checks the file; returns the exit code."""
    text = render()
    if arguments == ["--check"]:
        if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
            return 0
        print("docs/configuration.md is not up to date: run `make docs`.", file=sys.stderr)
        return 1
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
