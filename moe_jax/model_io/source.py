"""What kind of folder a path is. Needs the standard library alone, so that mistakes answer at
once.
"""

from __future__ import annotations

from pathlib import Path

from moe_jax.errors import UserError

HUB_NAME = r"[\w.-]+/[\w.-]+"


def check_step(path: Path, step: int | None, fallback: bool) -> None:
    """Raises UserError where a checkpoint is chosen in what is not a run."""
    if (step is not None or fallback) and not (path / "config.yaml").is_file():
        raise UserError(
            f"--step and --fallback choose a run's checkpoint and {path} is not a run directory: "
            f"leave them out."
        )


def require_run(run_dir: Path) -> None:
    """Raises UserError where `run_dir` is not the directory of a run."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir} is not a run directory (it has no config.yaml): give the --run-dir of a "
            f"`moe-jax train`."
        )


DTYPES = ("float32", "bfloat16")
