"""The command that compiles a run for chips that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from moe_jax.cli.options import AsJson, option, path_argument


def preflight(
    config: Annotated[Path, path_argument("CONFIG", help="YAML configuration.")],
    topology: Annotated[
        str,
        option(
            "--topology",
            metavar="CHIPS",
            help="v5p:4x4x4, v5e:16x16, tpu7x:4x4x4, gpu:h100x64 or cpu:8.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        option("--set", metavar="KEY=VALUE", help="Change a key; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run's memory and collectives before renting its chips."""
    from moe_jax.config.load import load_config
    from moe_jax.preflight.job import preflight as measure
    from moe_jax.preflight.report import print_tables

    result = measure(load_config(config, overrides or []), topology)
    if as_json:
        print(json.dumps(result.as_json(), indent=1))
    else:
        print_tables(result)


COMMANDS = [
    ("preflight", preflight, "moe-jax preflight configs/qwen3-30b-a3b.yaml --topology v5p:4x4x4")
]
