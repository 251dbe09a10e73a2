"""Quantities as text: sizes, rates, times, ranges of numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from moe_jax.errors import UserError


def gibibytes(size: float) -> str:
    """A size in GiB, or in MiB, KiB or bytes where it is small."""
    if size >= 2**30:
        return f"{size / 2**30:,.2f} GiB"
    if size >= 2**20:
        return f"{size / 2**20:,.1f} MiB"
    return f"{size / 2**10:,.1f} KiB" if size >= 2**10 else f"{size:,.0f} bytes"


def ranges(numbers: Any) -> str:
    """Numbers as text, runs of neighbours as `first-last`."""
    runs: list[list[int]] = []
    for number in sorted(int(number) for number in numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return (
        ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
        or "none"
    )


def one_of_these(things: Sequence[str]) -> str:
    """Alternatives as text: `a, b or c`."""
    *first, last = things
    return f"{', '.join(first)} or {last}" if first else last


def si(value: float | None, unit: str = "") -> str:
    """`value` with three figures and a decimal prefix: 2.1e11 with FLOP/s is `210 GFLOP/s`."""
    if value is None:
        return "unknown"
    power = min(int(math.log10(value)) // 3, 6) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {' kMGTPE'[power].strip()}{unit}".rstrip()


def binary(count: int) -> str:
    """A number of bytes as KiB, MiB, ..."""
    power = min(max(count.bit_length() - 1, 0) // 10, 5)
    return (
        f"{count / 1024**power:.{1 if power else 0}f} "
        f"{('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"
    )


def duration(seconds: float) -> str:
    """A span of time in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def less(fraction: float, digits: int = 0) -> str:
    """A fall by a fraction as words, a rise included: `14% less`, `3% more`."""
    return f"{abs(fraction):.{digits}%} {'less' if fraction >= 0 else 'more'}"


UNITS = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for unit, base in (("", 1024), ("ib", 1024), ("b", 1000))
}


def parse_bytes(text: str) -> int:
    """A size such as `24GiB`, `24G` (the same), `24GB` (10^9) or plain bytes. Raises UserError for
    anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    size = (
        round(float(match[1]) * UNITS[match[2].lower()])
        if match and match[2].lower() in UNITS
        else 0
    )
    if not size:
        raise UserError(
            f"--memory {text!r} cannot be read as a size: write it as 24GiB, 24GB or a number of "
            f"bytes."
        )
    return size
