"""Small Chronos checkpoints that chronos-forecasting has run, and what it computed.

A case is two files in tests/forecasting/cases: NAME.json says what the checkpoint looks like, and
NAME.npz holds what the library made of it (scripts/record_chronos.py writes both). The weights
themselves are not kept: `build` draws them again from the tensors' names. The folders `dummy-*`
are the checkpoints of the library's own tests (Apache-2.0, Amazon.com). Needs numpy and
safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.support.hf_cases import draw

FOLDER = Path(__file__).parents[1] / "forecasting" / "cases"
LEVELS = (0.05, 0.33, 0.5, 0.95)  # not all of them levels of the models


def describe(case: str) -> dict[str, Any]:
    """The content of a case's JSON file."""
    return json.loads((FOLDER / f"{case}.json").read_text(encoding="utf-8"))


def expected(case: str) -> dict[str, np.ndarray]:
    """What chronos-forecasting computed, in f32 with eager attention on one thread, and the inputs
    that it was given; scripts/record_chronos.py says what each array is.
    """
    with np.load(FOLDER / f"{case}.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def build(case: str, folder: Path) -> Path:
    """Writes config.json and model.safetensors as a hub repository has them into `folder`, and
    returns it.
    """
    return write_checkpoint(describe(case), case, folder)


def write_checkpoint(description: dict[str, Any], case: str, folder: Path) -> Path:
    """`build` for a description that need not be on disk yet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(description["config"]), encoding="utf-8")
    stream = f"{case}/{description['seed']}"
    tensors = {}
    for name, shape in description["tensors"].items():
        tensors[name] = draw(stream, name, tuple(shape))
        if name == "shared.weight":  # of deviation 1.2, as the output is scaled down
            tensors[name] *= np.float32(shape[1] ** 0.5)
        if name.startswith("output_patch_embedding."):  # forecasts of the size of their series
            tensors[name] *= np.float32(0.3)
        if name.endswith(".q.weight"):  # as T5 draws them, whose scores are not scaled
            tensors[name] *= np.float32(description["config"]["d_kv"] ** -0.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def size_of(series: np.ndarray) -> np.ndarray:
    """The mean of absolute values along the last dim, 1 where that is 0 or there are none."""
    seen = ~np.isnan(series)
    total = np.where(seen, np.abs(series), 0).sum(axis=-1) / np.maximum(seen.sum(axis=-1), 1)
    return np.where(total > 0, total, 1).astype(np.float32)


def awkward_series(length: int) -> np.ndarray:
    """Rows [11, length] with everything that a context may have; NaN in front of the short ones."""
    random = np.random.RandomState(7)
    steps = np.arange(length)
    wave = 10 * np.sin(steps / 4) + 0.05 * steps
    rows = np.stack([wave + random.randn(length) for _ in range(11)])
    for row, kept in enumerate((5, 16, 17, 96)):
        rows[row, : length - kept] = np.nan
    rows[4] = 100 * rows[4] + 3000
    rows[5, -20:-14] = np.nan  # a gap
    rows[6, -32:-8] = np.nan  # whole patches, as they are cut from the end
    rows[7] = np.nan
    rows[8] = 7.25  # constant
    rows[9] = 0
    rows[10] = steps % 12  # whole numbers
    return rows.astype(np.float32)
