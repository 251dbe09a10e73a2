"""What each process of a run says of itself, in RUN_DIR/processes/process_<i>.json, and the
accounts of the attempts that ended, in RUN_DIR/attempts.jsonl.

An attempt is one start of the program, which ends as its processes do. Nothing here needs a device
or JAX: `moe-jax status` reads the files from any machine that sees them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.utils.files import replace_text

FOLDER = "processes"
ATTEMPTS = "attempts.jsonl"
# Phases in which no step is under way: what a step has in them is computed.
STEP_UNDER_WAY = ("data", "compile", "step")


def process_path(run_dir: Path, process: int) -> Path:
    """Where a process says how it does."""
    return run_dir / FOLDER / f"process_{process}.json"


def read_processes(run_dir: Path) -> list[dict[str, Any]]:
    """What the processes last said, by their number; empty for a run of an earlier version.

    Raises UserError for a file that is none of ours.
    """
    told = []
    for path in (run_dir / FOLDER).glob("process_*.json"):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:  # cleared since it was listed
            continue
        told.append(_parse(text, path))
    return sorted(told, key=lambda said: said["process"])


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """The accounts of the attempts that ended before the newest one, oldest first.

    A last line that a kill cut short is left out. Raises UserError for another that is no account.
    """
    path = run_dir / ATTEMPTS
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [_parse(line, path) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def close_last_attempt(run_dir: Path, before: float) -> None:
    """Appends the account of the attempt that the files tell of to attempts.jsonl, and deletes the
    files: of those that said their last word before `before` (wall time), which is when the
    program that calls this began.
    """
    old = [said for said in read_processes(run_dir) if said["beat"] < before]
    if not old:
        return
    path = run_dir / ATTEMPTS
    kept = path.read_bytes() if path.exists() else b""
    whole = kept[: kept.rfind(b"\n") + 1]  # without a line that a kill cut short
    line = json.dumps(longest_lived(old)) + "\n"
    replace_text(path, whole.decode() + line, durable=True)
    for said in old:
        process_path(run_dir, said["process"]).unlink(missing_ok=True)


def longest_lived(told: list[dict[str, Any]]) -> dict[str, Any]:
    """The account of an attempt: what the process said that spoke last."""
    return max(told, key=lambda said: (said["beat"], -said["process"]))


def all_accounts(ended: list[dict[str, Any]], told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The accounts of all attempts, oldest first: those that ended, and that of the newest, of
    which its processes told.
    """
    return [*ended, longest_lived(told)] if told else ended


def steps_done(said: dict[str, Any]) -> int:
    """Steps that an attempt had computed when it said its last word."""
    return said["step"] - (said["phase"] in STEP_UNDER_WAY)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict) or not {"process", "beat", "attempt", "seconds"} <= said.keys():
        raise UserError(f"{path} does not say how a process does: delete it.")
    return said
