"""What a folder or a YAML file says about a model, without its weights: `describe`.

A Hugging Face folder is read from its config.json and the headers of its safetensors, a run from
its config.yaml, a converted folder from its moe_jax.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax import hf
from moe_jax.config.load import load_config
from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.model_io import packed_header
from moe_jax.model_io.source import DTYPES
from moe_jax.models.parameters import leaves, sizes
from moe_jax.ops.quantized import Kind
from moe_jax.tracking.run_dir import read_run_config, run_tokenizer

PARAMETER_KINDS = (
    "embedding",
    "attention",
    "dense feed-forward",
    "experts",
    "shared experts",
    "routers",
    "norms",
    "head",
)
WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
)  # pickles too: to be refused by name
RUN, CONVERTED = "run", "converted folder"  # values of `Description.source`


class Description(NamedTuple):
    """A model before it is planned for a mesh."""

    name: str
    source: str  # what it was read from
    model: ModelConfig
    moe: MoEConfig
    vocab_size: int
    context: int
    # to hold weights in, if nobody says otherwise: that of the files where we compute in it
    dtype: str
    quantization: Kind = "float"  # of a converted folder, which cannot be opened in another
    group: int = 64
    tokenizer: str = "bytes"  # what `load_tokenizer` takes
    hf_config: dict[str, Any] | None = (
        None  # the config.json that it has, or that the model it comes from had
    )
    file_bytes: dict[str, int] | None = None  # of weights by kind
    notes: tuple[str, ...] = ()


def kind_of(path: str) -> str:
    """Which of `KINDS` a leaf of the parameter tree is."""
    if path in ("embedding", "head"):
        return path
    if path.endswith("/scale"):
        return "norms"
    parts = {
        "/attention/": "attention",
        "/router/": "routers",
        "/experts/": "experts",
        "/shared_": "shared experts",
    }
    return next((kind for part, kind in parts.items() if part in path), "dense feed-forward")


def by_kind(paths: Iterable[str], count: Callable[[str], int]) -> dict[str, int]:
    """Sums of `count(path)` over the leaves of each kind, for the kinds that there are."""
    found = dict.fromkeys(PARAMETER_KINDS, 0)
    for path in paths:
        found[kind_of(path)] += count(path)
    return {kind: total for kind, total in found.items() if total}


def describe(path: Path) -> Description:
    """Reads a Hugging Face folder (with or without weights), a run, a converted folder or a YAML
    configuration.

    Raises UserError for anything else, and for a folder whose headers do not agree with its
    config.json.
    """
    if packed_header.is_packed(path):
        header = packed_header.read_packed_header(path)
        stored: dict[str, Any] = {"quantization": header.quantization, "group": header.group}
        stored |= {
            "tokenizer": packed_header.packed_tokenizer(path, header),
            "hf_config": read_kept_config(path),
        }
        found = (header.model, header.moe, header.vocab_size, header.context, header.dtype)
        return Description(header.name, CONVERTED, *found, **stored)
    if path.is_file() or (path / "config.yaml").is_file():
        return _configured(path)
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist: give a Hugging Face folder, a run, a converted folder or a "
            f"YAML configuration."
        )
    return _hugging_face(path)


def read_kept_config(path: Path) -> dict[str, Any] | None:
    """The config.json of the Hugging Face model that a run or a converted folder comes from; None
    if from none.
    """
    kept = path / packed_header.KEPT_CONFIG
    try:
        return json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
    except ValueError as error:
        raise UserError(
            f"{kept} is damaged ({error}): take it from where the model came from."
        ) from error


def _configured(path: Path) -> Description:
    if path.is_file():
        config, source, tokenizer = load_config(path), "configuration", None
        if config.init_from is not None:
            raise UserError(
                f"{path} takes its model from init_from={config.init_from}: inspect that folder."
            )
    else:
        config, source = read_run_config(path), RUN
        tokenizer = run_tokenizer(path, config)
    tokenizer = tokenizer or config.data.tokenizer
    vocab_size = config.model.vocab_size or load_tokenizer(tokenizer).vocab_size
    found = (config.model, config.moe, vocab_size, config.train.seq_len, config.model.compute_dtype)
    return Description(
        config.name,
        source,
        *found,
        tokenizer=tokenizer,
        hf_config=read_kept_config(path) if source == RUN else None,
    )


def _hugging_face(path: Path) -> Description:
    found = hf.read_config(path)
    name, source = path.resolve().name, f"{found.family}, Hugging Face folder"
    stated = found.config.get("dtype") or found.config.get("torch_dtype")
    dtype = stated if stated in DTYPES else "bfloat16"
    described = Description(
        name, source, found.model, found.moe, found.vocab_size, found.context, dtype
    )
    described = described._replace(tokenizer=str(path), hf_config=found.config)
    if any(file for pattern in WEIGHTS for file in path.glob(pattern)):
        checkpoint = hf.open_checkpoint(path)
        return described._replace(file_bytes=by_kind(checkpoint.shapes(), checkpoint.file_bytes))
    notes = ["There are no weights beside config.json: no tensor was checked."]
    if stated not in ("float32", "bfloat16", "float16") or "quantization_config" in found.config:
        return described._replace(notes=tuple(notes))
    notes.append(f"Bytes of the file are those of {stated}, which config.json names.")
    size, table = sizes(found.model, found.moe, found.vocab_size), leaves(found.model, found.moe)
    itemsize = 4 if stated == "float32" else 2

    def count(leaf):
        return (
            int(np.prod([size[dim] for dim in table[leaf].dims]))
            * len(table[leaf].layers or (0,))
            * itemsize
        )

    return described._replace(file_bytes=by_kind(table, count), notes=tuple(notes))
