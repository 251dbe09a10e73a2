"""Two processes restore together: the first one reads the files, both come to its verdict."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT


def test_the_first_process_verifies_files_for_all(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = str(taken.getsockname()[1])
    command = [sys.executable, "-m", "tests.support.restoring_process"]
    started = [
        subprocess.Popen(
            [*command, str(rank), port, str(tmp_path / "checkpoints")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    first, second = (json.loads(text.splitlines()[-1]) for text, _ in outputs)
    # Three steps were looked at: the damaged one twice, then the one before.
    assert (first["verified"], second["verified"]) == (3, 0)
    assert "step_00000002" in first["told"] and "--fallback takes step 1" in first["told"]
    assert second["told"] == first["told"]
    assert (first["step"], second["step"]) == (1, 1) and first["same"] and second["same"]
