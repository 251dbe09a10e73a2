"""The commands that take checkpoints in and out: convert, export, resize and inspect.

`main.py` adds them to `moe-jax`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from moe_jax.cli.console import explained_disk_errors
from moe_jax.cli.model_options import check_types, one_of, parse_mesh
from moe_jax.cli.options import (
    AsJson,
    Dtype,
    ExpertCacheSize,
    Fallback,
    Group,
    Mesh,
    Model,
    Out,
    Quantize,
    Step,
    option,
    path_argument,
    path_option,
)
from moe_jax.model_io.source import INT4_GROUP, check_step, find
from moe_jax.utils.files import refuse_existing
from moe_jax.utils.progress import say
from moe_jax.utils.units import parse_bytes


def convert(
    model: Model,
    out: Out,
    dtype: Dtype = None,
    quantize: Quantize = None,
    group: Group = INT4_GROUP,
    step: Step = None,
    fallback: Fallback = False,
) -> None:
    """Save a model as it is held for inference, to load fast.

    All of it must fit into memory once; the result opens on any mesh.
    """
    check_types(dtype, quantize, group)
    check_step(model, step, fallback)
    refuse_existing(out)
    from moe_jax.inference.convert import convert as write

    with explained_disk_errors(out):
        said = write(
            model,
            out,
            dtype=dtype,
            quantize=quantize,
            group=group,
            step=step,
            fallback=fallback,
        )
        say(said)


def export(
    model: Model,
    out: Out,
    dtype: Dtype = None,
    step: Step = None,
    fallback: Fallback = False,
) -> None:
    """Write a Hugging Face folder that transformers loads.

    All weights must fit into memory once.
    """
    check_types(dtype)
    check_step(model, step, fallback)
    refuse_existing(out)
    from moe_jax.model_io.export import publish

    with explained_disk_errors(out):
        say(publish(model, out, dtype=dtype, step=step, fallback=fallback))


def inspect(
    model: Annotated[
        Path, path_argument("MODEL", help="As for generate, or a YAML configuration.")
    ],
    mesh: Mesh = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    group: Group = INT4_GROUP,
    expert_cache_size: ExpertCacheSize = None,
    memory: Annotated[
        str | None,
        option("--memory", metavar="SIZE", help="Per device, such as 24GiB; exit 1 if less."),
    ] = None,
    context: Annotated[
        int | None,
        option(
            "--context", metavar="N", min=1, help="Tokens per sequence.  [default: the model's]"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Sequences at a time.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show what a model takes on a mesh, from its headers alone."""
    check_types(dtype, quantize, group)
    axes = None if mesh is None else parse_mesh(mesh)
    limit = None if memory is None else parse_bytes(memory)
    from moe_jax.inference.inspect import inspect as plan
    from moe_jax.inference.inspect import print_inspection, to_json

    with explained_disk_errors(model):
        described = find(model, yaml=True).describe()
    inspection = plan(
        described,
        mesh=axes,
        dtype=dtype,
        quantize=quantize,
        group=group,
        memory=limit,
        context=context,
        batch=batch,
        expert_cache=expert_cache_size,
    )
    if as_json:
        print(to_json(inspection))
    else:
        print_inspection(inspection)
    raise typer.Exit(1 if inspection.fits is False else 0)


def resize(
    run: Annotated[Path, path_argument("RUN", help="Run, or a dense Hugging Face folder.")],
    out: Out,
    experts: Annotated[
        int, option("--experts", metavar="N", min=1, help="Experts per layer afterwards.")
    ],
    top_k: Annotated[
        int | None,
        option("--top-k", metavar="K", min=1, help="Experts per token.  [default: the run's]"),
    ] = None,
    noise: Annotated[
        float | None,
        option(
            "--noise",
            metavar="X",
            help="On copies, relative to their weights.  [default: 0.01; dense: 0]",
        ),
    ] = None,
    moments: Annotated[
        str, typer.Option(metavar="zero|copy", help="Optimizer moments of copies.")
    ] = "zero",
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Seed of noise and new routers.")
    ] = 0,
    config: Annotated[
        Path | None,
        path_option("--config", metavar="YAML", help="How to train a Hugging Face folder."),
    ] = None,
    first_dense: Annotated[
        int | None,
        option(
            "--first-dense",
            metavar="N",
            min=0,
            help="Dense model: leading layers that stay dense.",
        ),
    ] = None,
    every: Annotated[
        int | None,
        option(
            "--every",
            metavar="N",
            min=1,
            help="Dense model: every n-th other layer gets experts.",
        ),
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
        experts=experts,
        top_k=top_k,
        noise=noise,
        moments="copy" if moments == "copy" else "zero",
        seed=seed,
        config=config,
        first_dense=first_dense,
        every=every,
    )
    with explained_disk_errors(out):
        print(write(run, out, wanted, step=step, fallback=fallback))


# Each command: its name, its function and the example that its help ends with.
COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    ("convert", convert, "moe-jax convert Qwen/Qwen3-30B-A3B qwen-int4 --quantize int4"),
    ("export", export, "moe-jax export runs/first first-hf --dtype bfloat16"),
    ("resize", resize, "moe-jax resize runs/first runs/wider --experts 12"),
    ("inspect", inspect, "moe-jax inspect Qwen/Qwen3-30B-A3B --mesh expert=2 --memory 24GiB"),
]
