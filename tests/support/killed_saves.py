"""Saves that are killed, each at a moment of its own.

    python -m tests.support.killed_saves FOLDER MOMENT...

Saves step 1 into FOLDER/MOMENT and is killed at that moment of the next save; prints how each
process ended, as JSON.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import jax

from moe_jax.checkpoint import integrity, manager, orbax_io
from tests.support.forked import exit_codes, signal_around
from tests.support.saved_state import make_state, mesh

# What counts afterwards: the step, and the seed of its state.
MOMENTS = {
    "copied": (1, 1),
    "written": (1, 1),
    "sealed": (1, 1),
    "replacing": (1, 1),
    "renamed": (2, 2),
    "pruning": (2, 2),
}


def arm(moment: str) -> None:
    def always(*arguments: Any) -> bool:
        return True

    def kill(owner: Any, name: str, **moments: Any) -> None:
        signal_around(owner, name, signal.SIGKILL, **moments)

    match moment:
        case "copied":
            kill(orbax_io, "Writing", after=always)
        case "written":
            kill(integrity, "write_durably", before=always)
        case "sealed":
            kill(integrity, "seal_directory", after=always)
        case "replacing":
            kill(Path, "rename", after=lambda path, to: str(to).endswith(".replaced"))
        case "renamed":
            kill(Path, "rename", after=lambda path, to: str(path).endswith("2.partial"))
        case "pruning":
            kill(Path, "rename", after=lambda path, to: str(to).endswith("1.partial"))
        case _:
            raise ValueError(moment)


def save_twice(directory: Path, moment: str) -> None:
    checkpoints = manager.Checkpoints(directory, keep_last=1, keep_best=0)
    checkpoints.save(1, make_state(mesh(2, 4), 1), {"step": 1}, wait=True)
    arm(moment)
    step = 1 if moment == "replacing" else 2
    checkpoints.save(step, make_state(mesh(2, 4), 2), {"step": 2}, wait=True)


def run() -> None:
    root, *moments = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps(exit_codes(moments, lambda name: save_twice(Path(root) / name, name))))


if __name__ == "__main__":
    run()
