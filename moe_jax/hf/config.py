"""What a Hugging Face folder's config.json says, as our own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.errors import UserError
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.families import FAMILIES
from moe_jax.hf.families.base import Family

CONFIG = "config.json"


class Architecture(NamedTuple):
    """A model that a folder describes."""

    folder: Path
    config: dict[str, Any]
    family: str
    model: ModelConfig
    moe: MoEConfig
    vocab_size: int
    context: int
    """Tokens that the positions are made for (`max_position_embeddings`)."""
    eos_ids: tuple[int, ...]
    """Tokens that end a text, from generation_config.json or else config.json; may be empty."""


def is_hf_folder(path: Path | str) -> bool:
    """Whether a path is a folder with a config.json."""
    return (Path(path) / CONFIG).is_file()


def read_config(folder: Path | str) -> Architecture:
    """Reads config.json alone. Raises UserError for what is missing, unknown or not supported, by
    name.
    """
    folder = Path(folder)
    if not is_hf_folder(folder):
        raise UserError(f"{folder} has no {CONFIG}: name a folder with a Hugging Face checkpoint.")
    config = _read_json(folder / CONFIG)
    family, model, moe = map_config(config, str(folder / CONFIG))
    context = Keys(config, str(folder / CONFIG)).get("max_position_embeddings", int)
    return Architecture(
        folder,
        config,
        family.model_type,
        model,
        moe,
        model.vocab_size or 0,
        context,
        eos_ids(folder, config),
    )


def map_config(config: dict[str, Any], where: str) -> tuple[Family, ModelConfig, MoEConfig]:
    """The family and the settings of a config; `where` starts every error."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type={kind!r} is not supported, only {', '.join(FAMILIES)}."
        )
    family, keys = FAMILIES[kind], Keys(config, where)
    if keys.get("max_position_embeddings", int) < 1:
        raise keys.refuse("max_position_embeddings", "leaves no room for a token")
    try:
        model, moe = family.read(keys)
    except UserError as error:
        # Bounds and combinations are checked by the sections themselves, which do not know the
        # file.
        text = str(error)
        raise UserError(text if text.startswith(where) else f"{where}: {text}") from None
    keys.finish()
    return family, model, moe


def eos_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Tokens that end a text: transformers stops at those of the folder's generation_config.json if
    it names any.
    """
    path = folder / "generation_config.json"
    stated = _read_json(path).get("eos_token_id") if path.is_file() else None
    stated = config.get("eos_token_id") if stated is None else stated
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(isinstance(token, int) for token in ids):
        raise UserError(
            f"{folder}: eos_token_id={stated!r} must be a token's number or a list of them."
        )
    return tuple(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again.") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} must hold an object, not a {type(content).__name__}: download it again."
        )
    return content
