"""Whole runs, small enough for a test: a text, a configuration of 27,000 parameters, and what two equal runs share."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_jax import measure
from moe_jax.config import load_config
from moe_jax.metrics import read_metrics
from moe_jax.schema import Config
from moe_jax.train import train

YAML = """
devices: {simulate: 8}
mesh: {data: 2, expert: 4}
model: {num_layers: 2, width: 32, num_heads: 2, num_kv_heads: 1, hidden: 32}
moe: {num_experts: 4, top_k: 2, hidden: 16}
optimizer: {warmup_steps: 2}
train: {steps: 4, global_batch: 16, seq_len: 32, eval_every: 5, eval_batches: 1, sample_prompt: ""}
checkpoint: {every: 3}
"""

# All that draws random numbers, keeps state between steps, or splits a step.
STATEFUL = (
    "train.steps=10",
    "train.accumulation=2",
    "moe.bias_rate=0.01",
    "moe.input_noise=0.1",
    "moe.expert_dropout=0.2",
    "moe.sequence_aux_loss=0.01",
    "moe.capacity_factor=1.0",
)
TIMES = ("tokens_per_second", "step_seconds", "mfu", "val_seconds")
RATE = (1e11, "float32 8 x 8 x 8")


@functools.cache
def corpus(folder: Path) -> Path:
    """A text file of 40,000 words in 200 documents of JSONL, some with characters of several bytes."""
    words = "the of and router expert token gate load caf\u00e9 na\u00efve \u4e13\u5bb6 \U0001f600".split()
    draw = random.Random(0)
    path = folder / "text.txt"
    path.write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(1200)), encoding="utf-8")
    return path


def config_file(folder: Path) -> Path:
    """A configuration that trains on `corpus`."""
    path = folder / "tiny.yaml"
    path.write_text(f"{YAML}data: {{source: {corpus(folder)}}}\n", encoding="utf-8")
    return path


def tiny(folder: Path, *overrides: str) -> Config:
    """The small configuration with `a.b=value` on top."""
    return load_config(config_file(folder), overrides)


def run(folder: Path, name: str, *overrides: str, **options: bool) -> Path:
    """Trains in this process, with a matmul rate that is given and not measured; the run directory."""
    directory = folder / name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "matmul_rate", lambda *_: RATE)
        train(tiny(folder, *overrides), directory, **options)
    return directory


@functools.cache
def finished(folder: Path, *overrides: str) -> Path:
    """A run that was trained once for all tests that only look at it."""
    return run(folder, f"finished-{abs(hash(overrides))}", *overrides)


def values(directory: Path) -> list[dict[str, Any]]:
    """The metrics lines without their times, and without the line that says that a run was resumed."""
    return without_times(record for record in read_metrics(directory / "metrics.jsonl") if record.get("event") != "resumed")


def without_times(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def training_lines(directory: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]
