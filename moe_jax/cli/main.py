"""The `moe-jax` command: train, report, watch and doctor, and the commands of the modules beside
this one.

Each command reads its arguments and calls one function of the package, which is imported only then,
so that help and mistakes in arguments answer at once. `run_training` and `write_report` are such
functions by a name of this module: a test may put its own in their place. Exit codes: 0 done; 1
doctor found something wrong; 2 a mistake that one sentence on stderr explains; 130 and 143
interrupted or terminated.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from moe_jax import __version__
from moe_jax.cli import (
    checkpoints,
    data,
    forecasting,
    inference,
    launch,
    placement,
    preflight,
    series,
    serving,
)
from moe_jax.cli.console import explained_disk_errors
from moe_jax.cli.options import (
    COMPUTING,
    AsJson,
    Fallback,
    Platform,
    ProcessFlags,
    RunDir,
    option,
    path_argument,
    path_option,
    spread,
)
from moe_jax.errors import UserError
from moe_jax.model_io.source import require_run
from moe_jax.runtime import distributed
from moe_jax.runtime.compile_cache import use_compile_cache
from moe_jax.runtime.devices import check_platform
from moe_jax.runtime.huge_pages import restart_with_huge_pages
from moe_jax.runtime.lasting_output import lasting_output
from moe_jax.runtime.parent import end_with_launch
from moe_jax.runtime.process import prepare_process
from moe_jax.runtime.signals import exit_on_sigterm

if TYPE_CHECKING:
    from moe_jax.config.schema import Config
    from moe_jax.data.corpus import SamplePrompt
    from moe_jax.training.result import TrainingResult

app = typer.Typer(
    name="moe-jax",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="\b\nExample:\n  moe-jax train configs/tiny.yaml --run-dir runs/first",
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line (by default this process's) and exits; mistakes become one sentence and
    exit code 2.
    """
    if arguments is None and sys.argv[1:2] and sys.argv[1] in COMPUTING:
        restart_with_huge_pages()
    end_with_launch()
    prepare_process()
    with exit_on_sigterm():
        try:
            with explained_disk_errors(), distributed.ending_together():
                app(args=arguments, prog_name="moe-jax")
        except UserError as error:
            print(f"moe-jax: {error}", file=sys.stderr)
            distributed.fail(str(error), 2)
            raise SystemExit(2) from None
        finally:
            _flush_stdout()
    raise SystemExit(0)


def _flush_stdout() -> None:
    """Writes what is left, quietly where the reader has gone (`moe-jax report RUN | head -0`)."""
    try:
        if sys.stdout:  # which a process that was started without one has not
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version(wanted: bool) -> None:
    if wanted:
        print(f"moe-jax {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Train and run sharded mixture-of-experts transformers in JAX."""


@app.command(
    epilog="\b\nExample:\n  moe-jax train configs/tiny.yaml --set train.steps=50 --run-dir "
    "runs/short"
)
@spread
def train(
    config: Annotated[Path, path_argument("CONFIG", help="YAML configuration.")],
    overrides: Annotated[
        list[str] | None,
        option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key, such as train.steps=50; may be repeated.",
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        path_option(
            "--run-dir",
            metavar="DIR",
            help="Where all output goes.  [default: the run whose config.yaml is CONFIG, else "
            "runs/NAME]",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in DIR from its newest checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in DIR first.")
    ] = False,
    fallback: Fallback = False,
    metrics_port: Annotated[
        int | None,
        option(
            "--metrics-port",
            metavar="PORT",
            min=1,
            max=65535,
            help="Serve metrics for Prometheus, on all addresses of process 0.",
        ),
    ] = None,
    *,
    processes: ProcessFlags,
) -> None:
    """Train a model and write its run directory."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other: give one of them.")
    if fallback and not resume:
        raise UserError("--fallback chooses the checkpoint to resume from: give --resume too.")
    from moe_jax.config.load import dump_config, load_config
    from moe_jax.tracking.run_dir import default_run_dir

    tree = load_config(config, overrides or [])
    place = default_run_dir(config, tree.name) if run_dir is None else run_dir
    processes.join(configuration=dump_config(tree), run_directory=str(place.absolute()))
    notice = f"Nobody reads standard output; the run goes on: moe-jax watch {place} shows it."
    with (
        lasting_output(notice),
        explained_disk_errors(place),
        _served_metrics(place, metrics_port),
    ):
        result = run_training(tree, place, resume=resume, overwrite=overwrite, fallback=fallback)
        if result.report is None:  # another process speaks, or there is nothing to draw
            return
        if result.stopped:
            print(
                f"Stopped after step {result.step}; saved. Continue with the same command and "
                f"--resume."
            )
        elif tree.train.sample_prompt != "" and result.sample_prompt is not None:
            _print_sample(tree, place, result.sample_fits, result.sample_prompt)
        print(f"Report: {result.report}")


def run_training(config: Config, directory: Path, **options: bool) -> TrainingResult:
    """Trains; see `moe_jax.training.trainer.train`."""
    use_compile_cache()
    from moe_jax.training import trainer

    return trainer.train(config, directory, **options)


def _served_metrics(run_dir: Path, port: int | None) -> AbstractContextManager[None]:
    if port is None:
        return nullcontext()
    from moe_jax.tracking.status.prometheus import served_metrics

    return served_metrics(run_dir, port)


def write_report(run_dir: Path) -> Path:
    """Draws the report of a run and returns its path."""
    from moe_jax.tracking.report import write_report as write

    return write(run_dir)


def _print_sample(config: Config, run_dir: Path, fits: bool, given: SamplePrompt) -> None:
    """Text of the trained model, drawn on one device; `given` is its prompt if the configuration
    has none.
    """
    if not fits:
        print("No sample: the parameters are not brought onto one device; use moe-jax generate.")
        return
    from moe_jax.generation.generate import generate_run

    chosen = config.train.sample_prompt
    text, prompt = given if chosen is None else (chosen, chosen)
    pieces = generate_run(
        run_dir,
        prompt,
        max_tokens=config.train.sample_tokens,
        temperature=0.8,
        top_k=None,
        top_p=0.95,
        seed=config.train.seed,
        step=None,
        fallback=False,
    )
    print(f"Sample (temperature 0.8, top-p 0.95):\n{text}{''.join(pieces)}\n")


for _name, _command, _example in (
    *inference.COMMANDS,
    *serving.COMMANDS,
    *checkpoints.COMMANDS,
    *preflight.COMMANDS,
    *forecasting.COMMANDS,
):
    app.command(_name, epilog=f"\b\nExample:\n  {_example}")(_command)


# Options end where COMMAND begins: what follows is its own.
app.command(
    "launch",
    context_settings={"allow_interspersed_args": False},
    epilog=f"\b\nExample:\n  {launch.EXAMPLE}",
)(launch.launch)


app.add_typer(
    placement.app, name="placement", epilog="\b\nExample:\n  moe-jax placement show runs/first"
)

app.add_typer(data.app, name="data", epilog="\b\nExample:\n  moe-jax data verify prepared")

app.add_typer(
    series.app,
    name="synth",
    epilog="\b\nExample:\n  moe-jax synth kernel --series 1000 --out corpus",
)


@app.command(epilog="\b\nExample:\n  moe-jax report runs/first")
def report(run_dir: RunDir) -> None:
    """Draw a run's report and plots again."""
    require_run(run_dir)
    with explained_disk_errors(run_dir):
        print(write_report(run_dir))


@app.command(epilog="\b\nExample:\n  moe-jax watch runs/first")
def watch(
    run_dir: RunDir,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame and exit, as always in a pipe.")
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.1, metavar="S", help="Seconds between looks.")
    ] = 2.0,
) -> None:
    """Follow a run live: progress, load, drops, moves, alerts."""
    from moe_jax.tracking.watch import watch as follow

    with explained_disk_errors(run_dir):
        follow(run_dir, once=once, interval=interval)


@app.command(epilog="\b\nExample:\n  moe-jax status runs/first --json")
def status(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Tell how a run does: processes, load, and where time went."""
    from moe_jax.tracking.status.table import print_status

    with explained_disk_errors(run_dir):
        print_status(run_dir, as_json=as_json)


@app.command(epilog="\b\nExample:\n  moe-jax doctor --json")
def doctor(
    platform: Platform = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check this machine: versions, devices, arithmetic."""
    check_platform(platform)
    from moe_jax.launch.doctor import examine, print_examination

    examination = examine(platform)
    print_examination(examination, as_json=as_json)
    raise typer.Exit(1 if examination.problems else 0)
