"""Quantities as text: sizes, rates, times, ranges of numbers."""

from __future__ import annotations

from typing import Any


def gibibytes(size: float) -> str:
    """A size in GiB, or in MiB where it is small."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def ranges(numbers: Any) -> str:
    """Numbers as text, runs of neighbours as `first-last`."""
    runs: list[list[int]] = []
    for number in sorted(int(number) for number in numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"
