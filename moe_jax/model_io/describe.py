"""What a folder or a YAML file says about a model, without its weights.

`source.find(path).describe()` comes here: a Hugging Face folder is read from its config.json and
the headers of its safetensors, a run from its config.yaml, a packed folder from its moe_jax.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax import hf
from moe_jax.config.load import load_config
from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.hf.safetensors import Shards
from moe_jax.model_io.hub import name_of
from moe_jax.model_io.packed_header import KEPT_CONFIG, packed_tokenizer, read_packed_header
from moe_jax.models.parameters import by_kind, parameters
from moe_jax.ops.quantized import Kind
from moe_jax.tracking.run_dir import read_run_config, run_tokenizer
from moe_jax.utils.files import is_left_by_system

# Files that hold weights; pickles too, to be refused by name.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth")
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}  # of types that config.json may name


class Description(NamedTuple):
    """A model before it is planned for a mesh."""

    name: str
    source: str  # what it was read from, in words
    model: ModelConfig
    moe: MoEConfig
    vocab_size: int
    context: int
    dtype: str  # of the files where we compute in it, else bfloat16
    masters: bool = False  # weights are read as f32 masters, then held in another type
    packed: bool = False  # weights can be opened in `dtype`, `quantization` and `group` alone
    quantization: Kind = "float"
    group: int = 64
    tokenizer: str = "bytes"  # what `load_tokenizer` takes
    # the config.json that it has, or that the model it comes from had
    hf_config: dict[str, Any] | None = None
    file_bytes: dict[str, int] | None = None  # of weights by kind
    notes: tuple[str, ...] = ()


def describe_packed(path: Path) -> Description:
    """Of a folder that `moe-jax convert` wrote."""
    header = read_packed_header(path)
    return Description(
        name=header.name,
        source="converted folder",
        model=header.model,
        moe=header.moe,
        vocab_size=header.vocab_size,
        context=header.context,
        dtype=header.dtype,
        packed=True,
        quantization=header.quantization,
        group=header.group,
        tokenizer=packed_tokenizer(path, header),
        hf_config=read_kept_config(path),
    )


def describe_run(path: Path) -> Description:
    """Of a run's directory."""
    config = read_run_config(path)
    tokenizer = run_tokenizer(path, config)
    return Description(
        name=config.name,
        source="run",
        model=config.model,
        moe=config.moe,
        vocab_size=config.model.vocab_size or load_tokenizer(tokenizer).vocab_size,
        context=config.train.seq_len,
        dtype=config.model.compute_dtype,
        masters=True,
        tokenizer=tokenizer,
        hf_config=read_kept_config(path),
    )


def describe_yaml(path: Path) -> Description:
    """Of a configuration. Raises UserError where it takes its model from another folder."""
    config = load_config(path)
    if config.init_from is not None:
        raise UserError(f"{path} takes its model from init_from={config.init_from}: inspect that.")
    tokenizer = config.data.tokenizer
    return Description(
        name=config.name,
        source="configuration",
        model=config.model,
        moe=config.moe,
        vocab_size=config.model.vocab_size or load_tokenizer(tokenizer).vocab_size,
        context=config.train.seq_len,
        dtype=config.model.compute_dtype,
        tokenizer=tokenizer,
    )


def describe_hugging_face(path: Path, shards: Shards | None = None) -> Description:
    """Of a Hugging Face folder, with or without weights; `shards` are those that are elsewhere.

    Raises UserError where their headers do not agree with its config.json.
    """
    read = hf.read_config(path)
    stated = read.config.get("dtype") or read.config.get("torch_dtype")
    described = Description(
        name=name_of(path),
        source=f"{read.family}, Hugging Face folder",
        model=read.model,
        moe=read.moe,
        vocab_size=read.vocab_size,
        context=read.context,
        dtype=stated if stated in ("float32", "bfloat16") else "bfloat16",
        tokenizer=str(path),
        hf_config=read.config,
    )
    files = (file for pattern in WEIGHTS for file in path.glob(pattern))
    if shards or not all(is_left_by_system(file) for file in files):
        checkpoint = hf.open_checkpoint(path, shards)
        return described._replace(
            model=checkpoint.model,  # whose head may be found to be no copy of the embedding
            hf_config=checkpoint.config,
            file_bytes=by_kind(checkpoint.shapes(), checkpoint.file_bytes),
        )
    notes = ["There are no weights beside config.json: no tensor was checked."]
    if stated not in _ITEMSIZE or "quantization_config" in read.config:
        return described._replace(notes=tuple(notes))
    notes.append(f"Bytes of the file are those of {stated}, which config.json names.")
    table = parameters(read.model, read.moe, read.vocab_size)
    file_bytes = by_kind(table, lambda name: table[name].size * _ITEMSIZE[stated])
    return described._replace(file_bytes=file_bytes, notes=tuple(notes))


def read_kept_config(path: Path) -> dict[str, Any] | None:
    """The config.json of the Hugging Face model that a run or a packed folder comes from; None if
    from none.
    """
    kept = path / KEPT_CONFIG
    try:
        return json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
    except ValueError as error:
        raise UserError(
            f"{kept} is damaged ({error}): take it from where the model came from."
        ) from error
