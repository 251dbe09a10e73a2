"""The command that changes the number of experts: resize; `cli.py` adds it to `moe-jax`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_jax.cli_checkpoints import Out
from moe_jax.cli_models import Fallback, Step
from moe_jax.console import explained_disk_errors
from moe_jax.model_choice import one_of
from moe_jax.model_io.source import check_step


def _option(metavar: str, help: str, **bounds: Any) -> Any:
    return typer.Option(metavar=metavar, show_default=False, help=help, **bounds)


def resize(
    run: Annotated[Path, typer.Argument(metavar="RUN", show_default=False, help="Run, or a dense Hugging Face folder.")],
    out: Out,
    experts: Annotated[int, _option("N", "Experts a layer afterwards.", min=1)],
    top_k: Annotated[int | None, _option("K", "Experts a token.  [default: the run's]", min=1)] = None,
    noise: Annotated[float | None, _option("X", "On copies, relative to their weights.  [default: 0.01; dense: 0]")] = None,
    moments: Annotated[str, typer.Option(metavar="zero|copy", help="Optimizer moments of copies.")] = "zero",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of noise and new routers.")] = 0,
    config: Annotated[Path | None, _option("YAML", "How to train a Hugging Face folder.")] = None,
    first_dense: Annotated[int | None, _option("N", "Dense model: leading layers that stay dense.", min=0)] = None,
    every: Annotated[int | None, _option("N", "Dense model: every n-th other layer gets experts.", min=1)] = None,
    step: Step = None,
    fallback: Fallback = False,
) -> None:
    """Add or remove experts: a new run that goes on from RUN.

    The busiest experts are copied, the least used removed; a dense model's feed-forward part is copied into N experts.
    """
    one_of("--moments", moments, ("zero", "copy"))
    check_step(run, step, fallback)
    from moe_jax.resize import Wanted
    from moe_jax.resize import resize as write

    wanted = Wanted(experts, top_k, noise, "copy" if moments == "copy" else "zero", seed, config, first_dense, every)
    with explained_disk_errors(out):
        print(write(run, out, wanted, step=step, fallback=fallback))


# Each command: its name, its function and the example that its help ends with.
COMMANDS: list[tuple[str, Callable[..., None], str]] = [("resize", resize, "moe-jax resize runs/first runs/wider --experts 12")]
