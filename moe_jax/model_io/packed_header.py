"""The header of a packed folder: what `moe-jax convert` says of the model that it saved.

What reads it is imported when it is read: command lines only ask whether there is one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.errors import UserError

if TYPE_CHECKING:
    from moe_jax.ops.quantized import Kind

PACKED_HEADER, PACKED_FORMAT = "moe_jax.json", 1
# The config.json of the Hugging Face model that this one comes from, for an export.
KEPT_CONFIG = "hf_config.json"


class PackedHeader(NamedTuple):
    """What OUT/moe_jax.json says."""

    format: int
    name: str
    model: ModelConfig
    moe: MoEConfig
    vocab_size: int
    context: int
    eos_ids: tuple[int, ...]
    dtype: str
    quantization: Kind
    group: int
    tokenizer: str  # "bytes", or "files" in OUT/tokenizer


def read_packed_header(path: Path) -> PackedHeader:
    """Raises UserError for one that cannot be read."""
    from moe_jax.config.load import section_from_dict

    try:
        values = json.loads((path / PACKED_HEADER).read_text(encoding="utf-8"))
        if values["format"] != PACKED_FORMAT:
            raise UserError(
                f"{path} has format {values['format']}, this version reads {PACKED_FORMAT}: "
                f"convert the model again."
            )
        values |= {
            "model": section_from_dict(ModelConfig, values["model"], "model."),
            "moe": section_from_dict(MoEConfig, values["moe"], "moe."),
        }
        return PackedHeader(**values | {"eos_ids": tuple(values["eos_ids"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / PACKED_HEADER} is damaged ({error}): convert the model again."
        ) from error


def packed_tokenizer(path: Path, header: PackedHeader) -> str:
    """What `load_tokenizer` takes."""
    return header.tokenizer if header.tokenizer == "bytes" else str(path / "tokenizer")
