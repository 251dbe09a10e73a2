"""Cases that `make test` leaves out, because the ones that it runs have the same subject."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

SLOW = pytest.mark.slow


def slow_unless(quick: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """Parameters for `parametrize`, those marked slow of which `quick` is false."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=[] if quick(case) else SLOW))
    return found
