"""From what we hold to a Hugging Face folder: a run, or a packed folder that is not quantised.

print(publish(Path("runs/first"), Path("first-hf"), dtype="bfloat16"))
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax import hf
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.data.tokenizer_files import copy_tokenizer, write_byte_tokenizer
from moe_jax.model_io.describe import Description
from moe_jax.model_io.source import RunSource, find_local
from moe_jax.profiling.flops import parameter_counts
from moe_jax.utils.progress import byte_progress

_TYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def publish(
    path: Path,
    out: Path,
    *,
    dtype: str | None = None,
    step: int | None = None,
    fallback: bool = False,
) -> str:
    """Writes the new folder `out`, which transformers loads; returns a sentence about it.

    A model that came from a Hugging Face folder keeps that folder's family and config; another gets
    the config of the family that it fits. Experts are written in logical order, whatever mesh and
    placement they were trained on. `dtype` is by default that of what is read: f32 for a run.

    Raises UserError where `out` exists, no family can express the model, or the disk is full;
    nothing is left of `out` then.
    """
    source = find_local(path)
    described = source.describe()
    family, config = _config(described)
    weights = source.weights(step=step, fallback=fallback)
    total = parameter_counts(described.model, described.moe, described.vocab_size)[0]
    # A run's masters are f32 whatever it computes in.
    wanted = dtype or ("float32" if isinstance(source, RunSource) else described.dtype)
    with (
        tempfile.TemporaryDirectory() as folder,
        byte_progress("exporting", total * np.dtype(_TYPES[wanted]).itemsize) as done,
    ):
        files = Path(folder) / "tokenizer"
        if described.tokenizer == "bytes":
            files.mkdir()
            write_byte_tokenizer(files)
        else:
            copy_tokenizer(described.tokenizer, files)

        def leaf(path: str) -> np.ndarray:
            array = weights.leaf(path, None).astype(_TYPES[wanted], copy=False)
            done(array.nbytes)
            return array

        hf.export(out, family, config, leaf, bias_LE=weights.bias_LE, tokenizer_from=files)
    return f"{out}: {family}, {total:,} parameters in {wanted}, from {path}."


def _config(described: Description) -> tuple[str, dict[str, Any]]:
    """The family and the config.json to write."""
    if described.hf_config is not None:
        return described.hf_config["model_type"], described.hf_config
    eos_id = load_tokenizer(described.tokenizer).eos_id
    return hf.config_of(
        described.model, described.moe, described.vocab_size, described.context, eos_id
    )
