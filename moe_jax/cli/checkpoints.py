"""The commands that take checkpoints in and out: convert, export and inspect; `cli.py` adds them to
`moe-jax`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_jax.cli.console import explained_disk_errors
from moe_jax.cli.inference import AsJson, Dtype, ExpertCacheSize, Fallback, Mesh, Quantize, Step
from moe_jax.cli.model_options import QUANTIZED, one_of, parse_mesh
from moe_jax.errors import UserError
from moe_jax.model_io.source import DTYPES, check_step, find
from moe_jax.utils.progress import say
from moe_jax.utils.units import parse_bytes

Out = Annotated[
    Path,
    typer.Argument(metavar="OUT", show_default=False, help="Folder to write; it must not exist."),
]
Group = Annotated[
    int, typer.Option(metavar="N", min=2, help="Inputs that share a scale with int4.")
]


def convert(
    model: Annotated[
        Path, typer.Argument(metavar="DIR", show_default=False, help="Hugging Face folder or run.")
    ],
    out: Out,
    dtype: Dtype = None,
    quantize: Quantize = None,
    group: Group = 64,
    step: Step = None,
    fallback: Fallback = False,
) -> None:
    """Save a model as it is held for inference, to load fast.

    All of it must fit into memory once; the result opens on any mesh.
    """
    _check(dtype, quantize, group)
    check_step(model, step, fallback)
    _refuse_existing(out)
    from moe_jax.inference.convert import convert as write

    with explained_disk_errors(out):
        say(
            write(
                model,
                out,
                dtype=dtype,
                quantize=quantize,
                group=group,
                step=step,
                fallback=fallback,
            )
        )


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", show_default=False, help="Run or converted folder.")
    ],
    out: Out,
    dtype: Dtype = None,
    step: Step = None,
    fallback: Fallback = False,
) -> None:
    """Write a Hugging Face folder that transformers loads.

    All weights must fit into memory once.
    """
    _check(dtype)
    check_step(run, step, fallback)
    _refuse_existing(out)
    from moe_jax.model_io.export import publish

    with explained_disk_errors(out):
        say(publish(run, out, dtype=dtype, step=step, fallback=fallback))


def inspect(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            show_default=False,
            help="Hugging Face, run or converted folder, or YAML.",
        ),
    ],
    mesh: Mesh = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    group: Group = 64,
    expert_cache_size: ExpertCacheSize = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", show_default=False, help="A device's, such as 24GiB; exit 1 if less."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens a sequence.  [default: the model's]"),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Sequences at a time.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show what a model takes on a mesh, from its headers alone."""
    _check(dtype, quantize, group)
    axes = None if mesh is None else parse_mesh(mesh)
    limit = None if memory is None else parse_bytes(memory)
    from moe_jax.inference.inspect import inspect as plan
    from moe_jax.inference.inspect import print_inspection, to_json

    with explained_disk_errors(model):
        described = find(model).describe()
    types: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "group": group}
    found = plan(
        described,
        mesh=axes,
        **types,
        memory=limit,
        context=context,
        batch=batch,
        expert_cache=expert_cache_size,
    )
    if as_json:
        print(to_json(found))
    else:
        print_inspection(found)
    raise typer.Exit(1 if found.fits is False else 0)


def _check(dtype: str | None, quantize: str | None = None, group: int = 64) -> None:
    one_of("--dtype", dtype, DTYPES)
    one_of("--quantize", quantize, QUANTIZED)
    if group % 2:
        raise UserError(
            f"--group {group} is odd, and int4 keeps two values a byte: choose an even number "
            f"such as 32 or 64."
        )


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists already: name another folder, or delete it.")


def _resize_option(metavar: str, help: str, **bounds: Any) -> Any:
    return typer.Option(metavar=metavar, show_default=False, help=help, **bounds)


def resize(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", show_default=False, help="Run, or a dense Hugging Face folder."
        ),
    ],
    out: Out,
    experts: Annotated[int, _resize_option("N", "Experts a layer afterwards.", min=1)],
    top_k: Annotated[
        int | None, _resize_option("K", "Experts a token.  [default: the run's]", min=1)
    ] = None,
    noise: Annotated[
        float | None,
        _resize_option("X", "On copies, relative to their weights.  [default: 0.01; dense: 0]"),
    ] = None,
    moments: Annotated[
        str, typer.Option(metavar="zero|copy", help="Optimizer moments of copies.")
    ] = "zero",
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Seed of noise and new routers.")
    ] = 0,
    config: Annotated[
        Path | None, _resize_option("YAML", "How to train a Hugging Face folder.")
    ] = None,
    first_dense: Annotated[
        int | None, _resize_option("N", "Dense model: leading layers that stay dense.", min=0)
    ] = None,
    every: Annotated[
        int | None, _resize_option("N", "Dense model: every n-th other layer gets experts.", min=1)
    ] = None,
    step: Step = None,
    fallback: Fallback = False,
) -> None:
    """Add or remove experts: a new run that goes on from RUN.

    The busiest experts are copied, the least used removed; a dense model's feed-forward part is
    copied into N experts.
    """
    one_of("--moments", moments, ("zero", "copy"))
    check_step(run, step, fallback)
    from moe_jax.training.resize.resize import Wanted
    from moe_jax.training.resize.resize import resize as write

    wanted = Wanted(
        experts,
        top_k,
        noise,
        "copy" if moments == "copy" else "zero",
        seed,
        config,
        first_dense,
        every,
    )
    with explained_disk_errors(out):
        print(write(run, out, wanted, step=step, fallback=fallback))


# Each command: its name, its function and the example that its help ends with.
COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    ("convert", convert, "moe-jax convert Qwen3-30B-A3B qwen-int4 --quantize int4"),
    ("export", export, "moe-jax export runs/first first-hf --dtype bfloat16"),
    ("resize", resize, "moe-jax resize runs/first runs/wider --experts 12"),
    ("inspect", inspect, "moe-jax inspect Qwen3-30B-A3B --mesh expert=2 --memory 24GiB"),
]
