"""The command that compiles a run for chips that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_jax.cli.model_options import check_types, parse_mesh
from moe_jax.cli.options import (
    AsJson,
    Context,
    Group,
    Mesh,
    Quantize,
    option,
    path_argument,
    path_option,
)
from moe_jax.errors import UserError
from moe_jax.model_io.source import INT4_GROUP


def preflight(
    config: Annotated[
        Path | None, path_argument("[CONFIG]", help="YAML configuration of a training run.")
    ] = None,
    topology: Annotated[
        str,
        option(
            "--topology",
            metavar="CHIPS",
            help="v5p:4x4x4, v5e:16x16, tpu7x:4x4x4, gpu:h100x64 or cpu:8.",
        ),
    ] = "",
    overrides: Annotated[
        list[str] | None,
        option("--set", metavar="KEY=VALUE", help="Change a key; may be repeated."),
    ] = None,
    serve: Annotated[
        Path | None,
        path_option("--serve", metavar="MODEL", help="A model to serve, or its configuration."),
    ] = None,
    mesh: Mesh = None,
    rows: Annotated[int, typer.Option(metavar="B", min=1, help="Serving: rows of a step.")] = 8,
    context: Context = None,
    prompt: Annotated[
        int | None,
        option("--prompt", metavar="N", min=1, help="Tokens of a prefill.  [default: context]"),
    ] = None,
    quantize: Quantize = None,
    group: Group = INT4_GROUP,
    program: Annotated[
        list[str] | None,
        option("--program", metavar="NAME", help="Compile only this one; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compile a run for chips that are not there, and see if it fits."""
    if not topology:
        raise UserError("--topology is missing: name the chips, such as v5p:4x4x4 or cpu:8.")
    if config is None and serve is None:
        raise UserError("nothing to compile: give CONFIG, or --serve MODEL.")
    check_types(None, quantize, group)
    axes = None if mesh is None else parse_mesh(mesh)
    from moe_jax.config.load import load_config
    from moe_jax.preflight.job import preflight as compile_run
    from moe_jax.preflight.report import print_tables
    from moe_jax.preflight.serving import Serving

    tree = None if config is None else load_config(config, overrides or [])
    kind: Any = quantize or "float"
    served = None
    if serve is not None:
        served = Serving(serve, rows, context, prompt, axes, kind, group)
    result = compile_run(topology, tree, served, program or ())
    if as_json:
        print(json.dumps(result.as_json(), indent=1))
    else:
        print_tables(result)


COMMANDS = [
    ("preflight", preflight, "moe-jax preflight configs/qwen3-30b-a3b.yaml --topology v5p:4x4x4")
]
