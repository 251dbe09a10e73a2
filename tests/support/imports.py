"""What `import` finds, within a test."""

from __future__ import annotations

import builtins
from typing import Any

import pytest


def replace_import(patch: pytest.MonkeyPatch, name: str, module: Any = None) -> None:
    """Code that the test runs and that imports `name` gets `module`; with None, the package is
    missing.
    """
    real = builtins.__import__

    def find(wanted: str, *rest: Any) -> Any:
        if wanted != name and not wanted.startswith(f"{name}."):
            return real(wanted, *rest)
        if module is None:
            raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted)
        return module

    patch.setattr(builtins, "__import__", find)
