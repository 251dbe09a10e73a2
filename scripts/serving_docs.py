"""Writes the table of fields into docs/serving.md from the one that checks requests:
python scripts/serving_docs.py [--check]

With --check nothing is written, and the exit code is 1 where the file is not up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moe_jax.serving.api.fields import markdown_rows

TARGET = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- fields: written by scripts/serving_docs.py -->\n", "<!-- end of fields -->\n"


def rendered(text: str) -> str:
    """The document with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{TARGET.relative_to(ROOT)} has lost the marks around its table.")
    return before + BEGIN + "".join(f"{row}\n" for row in markdown_rows()) + END + after


def main(arguments: list[str]) -> int:
    """Writes or checks the file; returns the exit code."""
    text = TARGET.read_text(encoding="utf-8")
    new = rendered(text)
    if arguments != ["--check"]:
        TARGET.write_text(new, encoding="utf-8")
    elif new != text:
        print("docs/serving.md is not up to date: run `make docs`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
