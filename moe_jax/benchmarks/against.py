"""Another library on the same shape and machine, in turns with ours: what `--against` asks for.

Each of its turns is a process of its own (`scripts/benchmark_transformers.py`), so that neither
holds the other's memory or threads. A shared machine's speed changes by the minute, so the ratio
is taken within each turn, and its median over the turns is what counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError

THEIRS = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_transformers.py"
SIZES = (
    "width",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "experts",
    "expert_hidden",
    "top_k",
    "vocab",
    "dtype",
)
Figures = dict[str, Any]


def add_options(add: Callable[..., Any]) -> None:
    """Those of a command that can be compared, by its parser's `add_argument`."""
    add("--against", choices=("transformers",), help="measure transformers too, in turns")
    add(
        "--turns",
        type=int,
        default=2,
        help="with --against: how often each is measured; medians are shown",
    )
    add("--python", help="with --against: an interpreter that has torch and transformers")


def in_turns(
    turns: int,
    ours: Callable[[], Figures],
    theirs: Callable[[], Figures],
    rates: tuple[str, ...],
) -> tuple[list[Figures], Figures]:
    """Measures both `turns` times; our figures of each turn, and the comparison: their median
    rates, and the median of the ratios of each turn, ours over theirs.
    """
    pairs = []
    for turn in range(1, turns + 1):
        pair = []
        for measure, name in ((ours, ""), (theirs, "  (transformers)")):
            pair.append(measure())
            speeds = (
                f"{rate.removesuffix('_per_second')} {pair[-1][rate]:,.1f}/s" for rate in rates
            )
            print(f"turn {turn}: {', '.join(speeds)}{name}", flush=True)
        pairs.append(pair)
    compared: Figures = {}
    for rate in rates:
        short = rate.removesuffix("_per_second").removesuffix("_tokens")
        compared[f"transformers_{rate}"] = statistics.median(other[rate] for _, other in pairs)
        compared[f"{short}_over_transformers"] = statistics.median(
            own[rate] / other[rate] for own, other in pairs
        )
    other = pairs[-1][1]
    compared["transformers_peak_bytes"] = max(their["peak_bytes"] for _, their in pairs)
    return [own for own, _ in pairs], compared | {"transformers_version": other["version"]}


def transformers(args: argparse.Namespace, what: str, python: str) -> Figures:
    """One turn of transformers, which trains or generates as `what` says. Raises UserError where
    it cannot.
    """
    names = {
        "generate": ("prompt", "generated", "batch", "steps"),
        "train": ("seq", "batch", "steps", "warmup", "untied"),
    }[what]
    options = {name: getattr(args, name) for name in (*SIZES, *names)}
    command = [python, str(THEIRS), what, json.dumps(options)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise UserError(
            f"--python {python} cannot run transformers ({said[-1] if said else error}): "
            f"name a Python with torch and transformers."
        ) from error
    return json.loads(done.stdout.splitlines()[-1])
