"""The command as a test calls it, and modules of this folder as programs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from moe_jax.cli import main
from tests.support import ROOT


def call(*arguments: object) -> int:
    """Exit code of `moe-jax ARGUMENTS`."""
    with pytest.raises(SystemExit) as caught:
        main.main([str(argument) for argument in arguments])
    code = caught.value.code
    assert isinstance(code, int)
    return code


def run_module(
    name: str,
    *arguments: object,
    timeout: float = 300,
    typed: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`python -m tests.support.NAME ARGUMENTS` in a process of its own; `typed` is its stdin."""
    return subprocess.run(
        [sys.executable, "-m", f"tests.support.{name}", *map(str, arguments)],
        capture_output=True,
        text=True,
        input=typed,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
    )
