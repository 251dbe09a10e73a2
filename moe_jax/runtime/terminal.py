"""The terminal of this process."""

from __future__ import annotations

import importlib.util


def edit_typed_lines() -> None:
    """Gives `input` line editing and history from now on, where the system has them."""
    if importlib.util.find_spec("readline"):  # Windows has none
        import readline  # noqa: F401  # whose import is the whole effect
