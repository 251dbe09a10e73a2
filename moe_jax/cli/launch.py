"""`moe-jax launch`: a command as several processes of this machine; `main.py` adds it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_jax.cli.options import COMPUTING, option, path_option
from moe_jax.errors import UserError

EXAMPLE = "moe-jax launch -n 2 --max-restarts 3 -- train configs/tiny.yaml"


def launch(
    context: typer.Context,
    processes: Annotated[int, option("-n", "--processes", metavar="N", help="How many processes.")],
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND ...",
            show_default=False,
            help="train, generate, chat, eval or bench, with its arguments.",
        ),
    ] = None,
    devices: Annotated[
        int | None,
        option(
            "--devices-per-process",
            metavar="D",
            min=1,
            help="Simulated CPU devices of each.  [default: its share of the mesh]",
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts",
            metavar="R",
            min=0,
            help="Restart a run from its last checkpoint so often after a death; a new checkpoint "
            "begins the count again.",
        ),
    ] = 0,
    log_dir: Annotated[
        Path | None,
        path_option(
            "--log-dir",
            metavar="DIR",
            help="Keep what each process writes to stderr.  [default: train: RUN/logs, else "
            "nowhere]",
        ),
    ] = None,
) -> None:
    """Run a command as N processes of this machine that form one mesh."""
    if processes < 1:
        raise UserError(f"-n {processes} starts nothing: give 1 or more.")
    if not command:
        raise UserError(
            "launch needs a command to run: moe-jax launch -n 2 -- train configs/tiny.yaml."
        )
    name = command[0]
    if name not in COMPUTING:
        raise UserError(
            f"launch cannot run {name!r} as several processes: give one of {', '.join(COMPUTING)}."
        )
    if sys.platform == "win32":
        raise UserError("launch needs Linux or macOS: start each process by hand (docs/pods.md).")
    parsed = _parse(context, command)
    if parsed.get("coordinator") is not None or parsed.get("process_id") is not None:
        raise UserError("launch chooses --coordinator and --process-id itself: leave them out.")
    if max_restarts and name != "train":
        raise UserError(f"--max-restarts is for train: {name} has no checkpoint to go on from.")
    run_dir = _run_dir(parsed, processes, devices) if name == "train" else None
    from moe_jax.launch.processes import Job, supervise

    job = Job(tuple(command), processes, devices, run_dir, log_dir)
    raise typer.Exit(supervise(job, max_restarts=max_restarts))


def _parse(context: typer.Context, command: list[str]) -> dict[str, Any]:
    """The command's parameters, so that a mistake in them is said once, before anything starts."""
    group: Any = context.parent.command if context.parent is not None else None
    found = group.get_command(context.parent, command[0])
    with found.make_context(command[0], list(command[1:]), parent=context.parent) as inner:
        return dict(inner.params)


def _run_dir(parsed: dict[str, Any], processes: int, devices: int | None) -> Path:
    """Where a training command writes. Raises UserError for a configuration that is wrong, or whose
    mesh so many processes cannot share.
    """
    from moe_jax.config.load import load_config

    config = load_config(parsed["config"], parsed["overrides"] or [])
    size = config.mesh.size
    if size % processes:
        raise UserError(
            f"-n {processes} processes cannot share the {size} devices of the mesh evenly: choose "
            f"a divisor of {size}."
        )
    if devices is not None and devices * processes != size:
        raise UserError(
            f"-n {processes} x --devices-per-process {devices} is {processes * devices} devices, "
            f"but the mesh has {size}: give --devices-per-process {size // processes}."
        )
    if parsed["run_dir"] is not None:
        return Path(parsed["run_dir"])
    from moe_jax.tracking.run_dir import default_run_dir

    return default_run_dir(parsed["config"], config.name)
