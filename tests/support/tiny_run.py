"""Whole runs, small enough for a test: a text, a configuration of some 20,000 parameters, and what
equal runs share.
"""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from moe_jax.cli import main
from moe_jax.config.load import load_config
from moe_jax.config.schema import Config
from moe_jax.profiling import machine
from moe_jax.tracking.metrics import read_metrics
from moe_jax.training import trainer as training
from moe_jax.training.step import TrainProgram

YAML = """
devices: {simulate: 8}
mesh: {data: 2, expert: 4}
model: {num_layers: 2, width: 32, num_heads: 2, num_kv_heads: 1, hidden: 32}
moe: {num_experts: 4, top_k: 2, hidden: 16}
optimizer: {warmup_steps: 2}
train: {steps: 6, global_batch: 16, seq_len: 32, eval_every: 5, eval_batches: 1, sample_prompt: ""}
checkpoint: {every: 3, keep_last: 9}
"""
# What draws random numbers, keeps state between steps, or splits a step.
STATEFUL = (
    "train.steps=8",
    "train.accumulation=2",
    "moe.bias_rate=0.01",
    "moe.input_noise=0.1",
    "moe.expert_dropout=0.2",
    "moe.sequence_aux_loss=0.01",
    "moe.capacity_factor=1.0",
)
TIMES = ("tokens_per_second", "step_seconds", "mfu", "val_seconds")
RATE = 1e11
WORDS = [
    "the",
    "of",
    "and",
    "router",
    "expert",
    "token",
    "gate",
    "load",
    "caf\u00e9",
    "na\u00efve",
    "\u4e13\u5bb6",
    "\U0001f600",
]


@functools.cache
def corpus(folder: Path) -> Path:
    """A text file of 9,600 words, some with characters of several bytes."""
    draw = random.Random(0)
    path = folder / "text.txt"
    path.write_text(
        "\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(1200)), encoding="utf-8"
    )
    return path


@functools.cache
def config_file(folder: Path) -> Path:
    """A configuration that trains on `corpus`."""
    path = folder / "tiny.yaml"
    path.write_text(f"{YAML}data: {{source: {corpus(folder)}}}\n", encoding="utf-8")
    return path


def tiny(folder: Path, *overrides: str) -> Config:
    """The small configuration with `a.b=value` on top."""
    return load_config(config_file(folder), overrides)


_programs: dict[Any, TrainProgram] = {}


def shared_program(*args: Any, **options: Any) -> TrainProgram:
    """`TrainProgram`, or the one made before of the same arguments, which is compiled."""
    *static, placement = args
    key = (
        *static,
        placement.num_experts,
        placement.physical_to_logical.tobytes(),
        *options.items(),
    )
    if key not in _programs:
        _programs[key] = TrainProgram(*args, **options)
    return _programs[key]


def run(
    folder: Path,
    directory: Path,
    *overrides: str,
    fresh: bool = False,
    report: bool = False,
    command: bool = False,
    **options: bool,
) -> Path:
    """Trains in this process into `directory`, with a matmul rate that is given and not measured.

    Nothing is compiled twice unless `fresh`, and no report is drawn unless asked for. With
    `command` it is `moe-jax train`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "matmul_rate", lambda *_: (RATE, "given by the test"))
        if not fresh:
            patch.setattr(training, "TrainProgram", shared_program)
        if not report:
            patch.setattr(training, "write_report", lambda run_dir: run_dir / "report.html")
        if command:
            words = ["train", str(config_file(folder)), "--run-dir", str(directory)]
            words += [word for override in overrides for word in ("--set", override)]
            words += [f"--{name}" for name, wanted in options.items() if wanted]
            with pytest.raises(SystemExit) as ended:
                main.main(words)
            assert ended.value.code == 0
        else:
            training.train(tiny(folder, *overrides), directory, **options)
    return directory


@functools.cache
def finished(folder: Path, *overrides: str) -> Path:
    """A run that is trained once for all tests that only look at it."""
    return run(folder, folder / f"finished-{finished.cache_info().misses}", *overrides, report=True)


def copy_until(source: Path, target: Path, step: int) -> Path:
    """A copy of a run as it was when the checkpoint of `step` was its newest."""
    shutil.copytree(source, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return target


def step_directory(directory: Path, step: int) -> Path:
    return directory / "checkpoints" / f"step_{step:08d}"


def lines(directory: Path) -> list[dict[str, Any]]:
    """The metrics lines without their times, and without the line that says that a run was
    resumed.
    """
    records = read_metrics(directory / "metrics.jsonl")
    return without_times(record for record in records if record.get("event") != "resumed")


def without_times(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def training_lines(directory: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]
