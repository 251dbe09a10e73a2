"""Another library on the same shape and machine, in turns with ours: what `--against` asks for.

Each of its turns is a process of its own (`scripts/benchmark_transformers.py`,
`scripts/benchmark_maxtext.py`), so that neither holds the other's memory or threads. A shared
machine's speed changes by the minute, so the ratio is taken within each turn, and its median over
the turns is what counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.runtime.devices import others_environment

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TRAINER = Path("src/maxtext/trainers/pre_train/train.py")  # in a copy of MaxText's source
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
RUNS = {
    "generate": ("prompt", "generated", "batch", "steps"),
    "train": ("seq", "batch", "steps", "warmup", "untied"),
}
MAXTEXT = ("data", "expert", "tensor", "capacity_factor", "dropless", "remat", "maxtext_option")
Figures = dict[str, Any]


def add_options(add: Callable[..., Any], *, maxtext: bool) -> None:
    """Those of a command that can be compared, by its parser's `add_argument`; with `maxtext` it
    can be compared with that too.
    """
    libraries = (
        "transformers, or maxtext and the folder of its source" if maxtext else "transformers"
    )
    add("--against", nargs="+", metavar="LIBRARY", help=f"measure {libraries} too, in turns")
    add(
        "--turns",
        type=int,
        default=2,
        help="with --against: how often each is measured; medians are shown",
    )
    add("--python", help="with --against: an interpreter that has what the other library needs")
    if maxtext:
        add(
            "--maxtext-option",
            action="append",
            metavar="KEY=VALUE",
            help="with --against maxtext: a setting of MaxText, as its command line takes it",
        )


class Library:
    """The library that `--against` names, for a command that trains or generates."""

    def __init__(self, args: argparse.Namespace, what: str, devices: int):
        """Raises UserError where `--against` names none, or one that does not do this."""
        self.name, *folder = args.against
        self._args, self._what, self._python = args, what, args.python or sys.executable
        asked = f"--against {' '.join(args.against)}"
        if self.name == "maxtext" and what == "train":
            if len(folder) != 1:
                raise UserError(f"{asked}: name one folder with the source of MaxText after it.")
            self._folder = Path(folder[0]).absolute()
            if not (self._folder / TRAINER).is_file():
                raise UserError(
                    f"{asked}: {folder[0]} is not MaxText, because it has no {TRAINER}; name a "
                    f"copy of github.com/AI-Hypercomputer/maxtext."
                )
        elif self.name != "transformers" or folder:
            also = ", or maxtext and the folder of its source" if what == "train" else ""
            raise UserError(f"{asked}: {what} is compared with transformers{also}.")
        elif what == "train" and devices > 1:
            raise UserError(
                f"{asked} runs on one device and the mesh has {devices}: leave --data, --expert "
                f"and --tensor out."
            )

    def turn(self) -> Figures:
        """The figures of one turn. Raises UserError where it cannot run."""
        names: list[str] = [*SIZES, *RUNS[self._what]]
        folder: list[str] = []
        if self.name == "maxtext":
            names, folder = [*names, *MAXTEXT], [str(self._folder)]
        options = json.dumps({name: getattr(self._args, name) for name in names})
        script = str(SCRIPTS / f"benchmark_{self.name}.py")
        command = [self._python, script, self._what, options, *folder]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=others_environment()
            )
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            needed = "torch and transformers" if self.name == "transformers" else "MaxText's needs"
            raise UserError(
                f"--python {self._python} cannot run {self.name} ({said[-1] if said else error}): "
                f"name a Python with {needed}."
            ) from error
        return json.loads(done.stdout.splitlines()[-1])


def in_turns(
    turns: int,
    ours: Callable[[], Figures],
    theirs: Callable[[], Figures],
    rates: tuple[str, ...],
    library: str,
) -> tuple[list[Figures], Figures]:
    """Measures both `turns` times; our figures of each turn, and the comparison with `library`: its
    median rates, and the median of the ratios of each turn, ours over theirs.
    """
    pairs = []
    for turn in range(1, turns + 1):
        pair = []
        for measure, name in ((ours, ""), (theirs, f"  ({library})")):
            pair.append(measure())
            speeds = (
                f"{rate.removesuffix('_per_second')} {pair[-1][rate]:,.1f}/s" for rate in rates
            )
            print(f"turn {turn}: {', '.join(speeds)}{name}", flush=True)
        pairs.append(pair)
    compared: Figures = {}
    for rate in rates:
        short = rate.removesuffix("_per_second").removesuffix("_tokens")
        compared[f"{library}_{rate}"] = statistics.median(other[rate] for _, other in pairs)
        compared[f"{short}_over_{library}"] = statistics.median(
            own[rate] / other[rate] for own, other in pairs
        )
    other = pairs[-1][1]
    compared[f"{library}_peak_bytes"] = max(their["peak_bytes"] for _, their in pairs)
    return [own for own, _ in pairs], compared | {f"{library}_version": other["version"]}
