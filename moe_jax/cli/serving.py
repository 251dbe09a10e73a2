"""The commands around a server: bench-serve; `main.py` adds them to `moe-jax`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_jax.cli.options import AsJson, option, path_option
from moe_jax.utils.progress import say


def bench_serve(
    url: Annotated[
        str, typer.Argument(metavar="URL", show_default=False, help="As http://127.0.0.1:8000.")
    ],
    requests: Annotated[
        int, typer.Option("--requests", min=1, metavar="N", help="How many there are.")
    ] = 200,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, max=1024, metavar="N", help="Open at a time.")
    ] = 16,
    prompt_tokens: Annotated[
        int, typer.Option("--input", min=1, metavar="N", help="Tokens of each prompt.")
    ] = 512,
    answer_tokens: Annotated[
        int, typer.Option("--output", min=1, metavar="N", help="Tokens of each answer.")
    ] = 128,
    rate: Annotated[
        float | None,
        option(
            "--rate",
            min=0.001,
            metavar="R",
            help="Requests per second, at random times.  [default: as fast as answers come]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the prompts.")] = 0,
    api_key_file: Annotated[
        Path | None, path_option("--api-key-file", metavar="FILE", help="The server's key.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a server: time to tokens, throughput, errors."""
    from moe_jax.serving.keys import read_keys
    from moe_jax.serving.load import RequestLoad, ServerUnderLoad, measure_server

    key = None if api_key_file is None else read_keys(api_key_file)[0].decode()
    load = RequestLoad(requests, concurrency, prompt_tokens, answer_tokens, rate, seed)

    def progress(done: int) -> None:
        if done % max(1, requests // 5) == 0:
            say(f"{done} of {requests} requests")

    figures = measure_server(ServerUnderLoad(url, key), load, progress)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        _print(figures)


def _print(figures: dict[str, Any]) -> None:
    for name in ("first_token", "token", "request"):
        if spread := figures[f"{name}_seconds"]:
            values = "  ".join(f"{key} {value * 1e3:,.1f}" for key, value in spread.items())
            label = {"first_token": "time to first token", "token": "time per token"}.get(
                name, name
            )
            print(f"{label:20} {values} ms")
    for name, unit in (("generated_tokens", "tokens/s"), ("prompt_tokens", "tokens/s")):
        print(f"{name.replace('_', ' '):20} {figures[f'{name}_per_second']:,.1f} {unit}")
    print(f"{'requests':20} {figures['requests']} in {figures['seconds']:,.1f} s")
    for error, count in figures["errors"].items():
        print(f"{'errors':20} {count} x {error}")


COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    ("bench-serve", bench_serve, "moe-jax bench-serve http://127.0.0.1:8000 --concurrency 16"),
]
