"""`moe-jax launch`: a command as several processes of this machine; `main.py` adds it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_jax.cli.options import COMPUTING, option, path_option
from moe_jax.errors import UserError

if TYPE_CHECKING:
    from moe_jax.config.schema import MeshConfig

ELASTIC_RESTARTS = 3
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
        int | None,
        typer.Option(
            "--max-restarts",
            metavar="R",
            min=0,
            show_default=False,
            help="Restart a run from its last checkpoint, or a server, so often after a death; a "
            "new checkpoint, or an hour, begins the count again.  [default: 0; with --elastic "
            f"{ELASTIC_RESTARTS}]",
        ),
    ] = None,
    elastic: Annotated[
        bool,
        typer.Option(
            "--elastic",
            help="Restart without the processes that died, on a smaller mesh; SIGUSR2 to launch "
            "brings all back.",
        ),
    ] = False,
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
    name, parsed = _checked(context, command or [], processes, max_restarts, elastic)
    from moe_jax.launch.processes import Job, supervise

    words, shrinking = tuple(command or ()), None
    job = Job(words, processes, devices, log_dir=log_dir)
    if name == "train":
        run_dir, mesh, simulated = _training(parsed, processes, devices)
        job = dataclasses.replace(job, run_dir=run_dir)
        if elastic:
            from moe_jax.launch.elastic import Elastic

            overrides = tuple(parsed["overrides"] or ())
            shrinking = Elastic(job, str(parsed["config"]), overrides, mesh, simulated)
    restarts = (ELASTIC_RESTARTS if elastic else 0) if max_restarts is None else max_restarts
    raise typer.Exit(supervise(job, max_restarts=restarts, elastic=shrinking))


def _checked(
    context: typer.Context,
    command: list[str],
    processes: int,
    max_restarts: int | None,
    elastic: bool,
) -> tuple[str, dict[str, Any]]:
    """The command's name and parameters. Raises UserError for what cannot be launched."""
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
    if max_restarts and name not in ("train", "serve"):
        raise UserError(
            f"--max-restarts is for train and serve: {name} has no checkpoint to go on from."
        )
    if elastic:
        _check_elastic(name, processes, max_restarts)
    return name, parsed


def _check_elastic(name: str, processes: int, max_restarts: int | None) -> None:
    if name != "train":
        raise UserError(f"--elastic is for train: {name} has no checkpoint to go on from.")
    if processes == 1:
        raise UserError("--elastic needs processes to lose: -n 1 has only one; give -n 2 or more.")
    if max_restarts == 0:
        raise UserError(
            "--elastic goes on after a death, which --max-restarts 0 forbids: leave one out."
        )


def _parse(context: typer.Context, command: list[str]) -> dict[str, Any]:
    """The command's parameters, so that a mistake in them is said once, before anything starts."""
    group: Any = context.parent.command if context.parent is not None else None
    found = group.get_command(context.parent, command[0])
    with found.make_context(command[0], list(command[1:]), parent=context.parent) as inner:
        return dict(inner.params)


def _training(
    parsed: dict[str, Any], processes: int, devices: int | None
) -> tuple[Path, MeshConfig, bool]:
    """Where a training command writes, its mesh, and whether its devices are simulated ones. Raises
    UserError for a configuration that is wrong, or whose mesh so many processes cannot share.
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
    from moe_jax.tracking.run_dir import default_run_dir

    asked = parsed["run_dir"]
    run_dir = Path(asked) if asked is not None else default_run_dir(parsed["config"], config.name)
    return run_dir, config.mesh, bool(config.devices.simulate)
