"""Records what `moe-jax preflight` says of the configurations and pods in docs/pods.md: python
scripts/record_preflights.py [RUN ...] [--missing] [--program NAME]

The command itself compiles each program of a run, one after another, and what it says is kept in
tests/preflight/recorded/training.json as soon as it is there, to which
tests/preflight/test_recorded.py holds the configurations and the tables of docs/pods.md. A program
of a large model takes minutes. --missing compiles only what is not recorded for the settings of
today, --table nothing at all; both print the tables of that page.

Needs moe-jax[preflight].
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moe_jax.config.load import load_config
from moe_jax.config.schema import Config
from moe_jax.errors import UserError
from moe_jax.preflight.programs import (
    CHECKSUM,
    EVALUATION,
    INITIAL_STATE,
    SLOT_CHECKSUMS,
    TRAIN_STEP,
)

RECORD = ROOT / "tests/preflight/recorded/training.json"
# What a run without moving experts compiles, the dearest last.
PROGRAMS = (INITIAL_STATE, CHECKSUM, SLOT_CHECKSUMS, EVALUATION, TRAIN_STEP)
SENT = ("", "all-to-all")  # kinds of collectives that the tables count
SIZES = ("argument_bytes", "output_bytes", "temp_bytes", "code_bytes", "peak_bytes")


class Run(NamedTuple):
    """What is compiled."""

    config: str
    topology: str
    overrides: tuple[str, ...] = ()
    programs: tuple[str, ...] = PROGRAMS

    @property
    def words(self) -> list[str]:
        """The command's arguments."""
        sets = [word for pair in self.overrides for word in ("--set", pair)]
        chosen = () if self.programs == PROGRAMS else self.programs
        only = [word for program in chosen for word in ("--program", program)]
        config = f"configs/{self.config}.yaml"
        return ["preflight", config, "--topology", self.topology, *sets, *only]

    def load(self) -> Config:
        """The configuration."""
        return load_config(ROOT / f"configs/{self.config}.yaml", self.overrides)


# The shape of OLMoE-1B-7B, which configs/finetune.yaml reads from its folder.
OLMOE = (
    *("init_from=null", "model.vocab_size=50304", "model.num_layers=16", "model.width=2048"),
    *("model.num_heads=16", "model.num_kv_heads=16", "model.qk_norm_over=width"),
    *("model.tied_embeddings=false", "moe.num_experts=64", "moe.top_k=8", "moe.hidden=1024"),
    *("moe.normalize=before", "moe.dropless=true"),
)


def _chips(topology: str, data: int) -> Run:
    """Four layers of Qwen3-30B-A3B, one sequence per chip, on `data` x 16 chips."""
    batch = f"train.global_batch={16 * data}"
    sets = ("model.num_layers=4", f"mesh.data={data}", batch, "train.accumulation=1")
    return Run("qwen3-30b-a3b", topology, sets, (TRAIN_STEP,))


# A run that is called like its configuration is the one that the configuration promises a size for.
RUNS = {
    "qwen3-30b-a3b": Run("qwen3-30b-a3b", "v5p:4x4x4"),
    "qwen3-30b-a3b on 512": Run(
        "qwen3-30b-a3b", "v5p:8x8x8", ("mesh.data=32", "train.global_batch=2048")
    ),
    "mixtral-8x7b": Run("mixtral-8x7b", "v5p:4x4x4"),
    "mixtral-8x7b on 32": Run("mixtral-8x7b", "v5p:2x4x4", ("mesh.data=4", "train.accumulation=8")),
    "deepseek-v3": Run("deepseek-v3", "v5p:8x8x16"),
    "finetune": Run("finetune", "v5p:2x2x2", OLMOE),
    "small-gpu": Run("small-gpu", "gpu:h100x1"),
}
SCALING = {
    "16 chips": _chips("v5p:2x2x4", 1),
    "64 chips": _chips("v5p:4x4x4", 4),
    "512 chips": _chips("v5p:8x8x8", 32),
    "2,048 chips": _chips("v5p:8x16x16", 128),  # as many as share a width of 2048
}
ALL = RUNS | SCALING


def settings(config: Config) -> dict[str, Any]:
    """What decides the size of a run's programs, as JSON gives it back."""
    train = config.train
    return {
        "mesh": [config.mesh.data, config.mesh.expert, config.mesh.tensor],
        "batch": [train.global_batch, train.seq_len, train.accumulation],
        "layers": [config.model.num_layers, config.model.width, config.model.vocab_size],
        "heads": [config.model.num_heads, config.model.num_kv_heads, config.model.head_width],
        "experts": [config.moe.num_experts, config.moe.top_k, config.moe.hidden],
        "rows": [config.moe.capacity_factor, config.moe.dropless],
        "types": [config.model.compute_dtype, config.model.remat],
    }


def measure(run: Run, program: str) -> dict[str, Any]:
    """What the command says of one program of a run, with the entry of its run."""
    words = [*run._replace(programs=(program,)).words, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "moe_jax", *words], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    if done.returncode:
        raise UserError(f"{' '.join(words)} ended with exit code {done.returncode}.")
    told = json.loads(done.stdout)
    [one] = told["programs"]
    sent = ("kind", "axes", "devices", "times", "bytes", "hidden_bytes")
    return {
        "command": " ".join(run.words),
        **{key: told[key] for key in ("topology", "devices", "chip", "estimated")},
        "settings": settings(run.load()),
        "programs": {
            program: {
                **{key: one[key] for key in SIZES},
                "refused": one["refused"],
                "compile_seconds": round(one["compile_seconds"]),
                "collectives": [{key: each[key] for key in sent} for each in one["collectives"]],
                "date": datetime.date.today().isoformat(),
                "versions": told["versions"],
            }
        },
    }


def recorded() -> dict[str, Any]:
    """What has been measured, by the names of the runs."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def record(name: str, programs: Sequence[str], *, missing: bool) -> None:
    """Compiles these programs of a run, and keeps each as soon as it is measured."""
    run = ALL[name]
    for program in programs:
        entry = recorded().get(name)
        if entry is not None and entry["settings"] != settings(run.load()):
            entry = None  # of another model
        done = {} if entry is None else entry["programs"]
        if missing and program in done:
            continue
        measured = measure(run, program)
        measured["programs"] = {
            key: value
            for key in PROGRAMS
            if (value := {**done, **measured["programs"]}.get(key)) is not None
        }
        known = {**recorded(), name: measured}
        in_order = {key: known[key] for key in ALL if key in known}
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(in_order, indent=1) + "\n")


def unmeasured() -> set[str]:
    """Runs of which a program has no record."""
    known = recorded()
    return {
        name
        for name, run in ALL.items()
        if set(run.programs) - set(known.get(name, {"programs": {}})["programs"])
    }


def sent(entry: dict[str, Any], kind: str = "") -> int:
    """Bytes that leave a device in a training step, of one kind of collective or of all."""
    collectives = entry["programs"][TRAIN_STEP]["collectives"]
    return sum(one["bytes"] for one in collectives if kind in one["kind"])


def row(name: str, entry: dict[str, Any]) -> str:
    """A run as a row of docs/pods.md, GB; - for what has not been measured."""
    programs = entry["programs"]
    step = programs.get(TRAIN_STEP)
    cells = [name, f"`{entry['topology']}`"]
    for key in ("argument_bytes", "temp_bytes", "peak_bytes"):
        cells.append("-" if step is None else f"{step[key] / 1e9:.2f}")
    cells += ["-", "-"] if step is None else [f"{sent(entry, k) / 1e9:.2f}" for k in SENT]
    if ALL[name].programs == PROGRAMS:
        initial = programs.get(INITIAL_STATE)
        cells.append("-" if initial is None else f"{initial['temp_bytes'] / 1e9:.2f}")
        peaks = {one["peak_bytes"]: program for program, one in programs.items()}
        whole = len(programs) == len(PROGRAMS)
        cells.append(f"{max(peaks) / 1e9:.2f}, {peaks[max(peaks)]}" if whole else "-")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="RUN", help=f"one of {', '.join(ALL)}")
    parser.add_argument("--missing", action="store_true", help="only what is not recorded")
    parser.add_argument("--program", choices=PROGRAMS, help="only this program of each run")
    parser.add_argument("--table", action="store_true", help="print the tables of docs/pods.md")
    args = parser.parse_args()
    for name in () if args.table else args.names or ALL:
        if name not in ALL:
            parser.error(f"{name!r} is unknown: choose from {', '.join(ALL)}")
        programs = [one for one in ALL[name].programs if args.program in (None, one)]
        record(name, programs, missing=args.missing)
    entries = recorded()
    print("\n".join(row(name, entry) for name, entry in entries.items()))
    print("\n".join(f"moe-jax {entry['command']}" for entry in entries.values()))
    print(f"not measured: {', '.join(sorted(unmeasured())) or 'nothing'}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
