"""Which steps of a run have a checkpoint, by the names in its folder alone; without JAX."""

from __future__ import annotations

import re
from pathlib import Path

COMMITTED = ".committed"


def saved_steps(directory: Path) -> list[int]:
    """The steps that count, ascending (manager.py says which do); none where there is no folder."""
    pattern = rf"step_(\d+)(\.replaced|{re.escape(COMMITTED)})?"
    names = (re.fullmatch(pattern, path.name) for path in directory.glob("step_*"))
    return sorted({int(match[1]) for match in names if match})


def step_path(directory: Path, step: int, suffix: str = "") -> Path:
    """Where a step is, or with a suffix what stands beside it."""
    return directory / f"step_{step:08d}{suffix}"
