"""The command as a process that a test starts, watches and stops."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.support import ROOT

LIMIT = 400.0  # seconds: several processes share the cores and compile


def set_options(settings: Mapping[str, object]) -> list[str]:
    """`--set KEY=VALUE` for each setting."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def start(*arguments: object, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """`moe-jax ARGUMENTS`, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "moe_jax", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Until the run has written the line of a step."""
    metrics, end = run_dir / "metrics.jsonl", time.monotonic() + LIMIT
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
