"""What a Hugging Face folder's config.json says, as our own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config.model import ModelConfig, MoEConfig, RopeConfig
from moe_jax.errors import UserError
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.families import FAMILIES
from moe_jax.hf.families.base import Family
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.utils.files import download_again
from moe_jax.utils.progress import say_once

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
    """Tokens that the positions are made for: `max_position_embeddings`, or what YaRN makes of the
    original length.
    """
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
        raise UserError(_without_config(folder))
    config = _read_json(folder / CONFIG)
    family, model, moe, passed = _map(config, str(folder / CONFIG))
    if passed:
        say_once(
            f"{folder / CONFIG}: passed over {', '.join(passed)}, which no {family.model_type} "
            f"model is known to have and whose value says that it is off."
        )
    return Architecture(
        folder,
        config,
        family.model_type,
        model,
        moe,
        model.vocab_size or 0,
        _context(config["max_position_embeddings"], model.rope),
        eos_ids(folder, config),
    )


def map_config(config: dict[str, Any], where: str) -> tuple[Family, ModelConfig, MoEConfig]:
    """The family and the settings of a config; `where` starts every error."""
    return _map(config, where)[:3]


def _map(config: dict[str, Any], where: str) -> tuple[Family, ModelConfig, MoEConfig, list[str]]:
    """`map_config`, and the keys that were passed over without being known."""
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
    keys.agree(_facts(model, moe))
    return family, model, moe, keys.finish()


def _facts(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """Properties of a model by keys that some configs name them with, read or not by the family."""
    facts = {
        "attention_bias": model.qkv_bias,
        "is_causal": True,
        "mlp_bias": model.mlp_bias,
        "qkv_bias": model.qkv_bias,
        "use_qk_norm": model.qk_norm,
        "use_rope": True,
    }
    if not count_moe_layers(model, moe):
        return facts
    return facts | {
        "n_shared_experts": moe.shared_experts,
        "norm_topk_prob": moe.normalize == "after",
        "num_experts": moe.num_experts,
        "num_local_experts": moe.num_experts,
        "routed_scaling_factor": moe.routed_scale,
        "scoring_func": moe.score,
        "shared_expert_intermediate_size": moe.shared_width,
    }


def _context(stated: int, rope: RopeConfig) -> int:
    """Tokens that a model may hold.

    YaRN is made for `factor` times the original length, which is the context where the config
    states less: Qwen's model cards add YaRN without raising `max_position_embeddings`, and vLLM
    reads it so. (transformers sets no limit.)
    """
    if rope.scaling != "yarn":
        return stated
    return max(stated, round(rope.factor * rope.original_length))


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


def _without_config(folder: Path) -> str:
    """What is wrong with a folder that has no config.json, and what to do about it."""
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} holds an adapter (LoRA) without its model: merge the two with peft's "
            f"merge_and_unload, save the result and name that folder."
        )
    if gguf := sorted(folder.glob("*.gguf")):
        return (
            f"{folder} holds GGUF ({gguf[0].name}), which is not read: take the model's "
            f"safetensors."
        )
    # A folder of the hub's cache (models--org--name) has its files in snapshots/COMMIT.
    inner = sorted(folder.glob(f"snapshots/*/{CONFIG}")) or sorted(folder.glob(f"*/{CONFIG}"))
    if len(inner) == 1:
        return f"{folder} has no {CONFIG}, and {inner[0].parent} has: name that folder."
    if inner:
        return f"{folder} has no {CONFIG}: name a model in it, such as {inner[0].parent}."
    return f"{folder} has no {CONFIG}: name a folder with a Hugging Face checkpoint."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {download_again(path)}.") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} must hold an object, not a {type(content).__name__}: download it again."
        )
    return content
