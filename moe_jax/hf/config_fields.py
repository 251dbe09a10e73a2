"""Pieces of a config.json that families share: rotary embedding, attention windows, the dense
skeleton, losses.

What absent keys mean, and what each key does, is that of transformers 5.23.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from moe_jax.config.model import MoEConfig, RopeConfig
from moe_jax.errors import UserError
from moe_jax.hf.config_keys import Keys

_ROPES = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
}


class Skeleton(NamedTuple):
    """What every family's config says in the same words."""

    layers: int
    settings: dict[str, Any]  # of ModelConfig


def skeleton(
    keys: Keys,
    *,
    kv_heads: int | None = None,
    theta: float = 10_000.0,
    eps: float = 1e-6,
    rope: RopeConfig | None = None,
    quantised: bool = False,
) -> Skeleton:
    """Sizes, norms, embeddings and rotation of an ordinary decoder.

    `kv_heads`, `theta` and `eps` are what absent keys mean; null for the first is as many as query
    heads.
    """
    if not quantised and keys.get("quantization_config", dict, None):
        method = keys.section("quantization_config").values.get("quant_method")
        raise UserError(
            f"{keys.where}: quantization_config of method {method} is not supported: take the "
            f"checkpoint that is not quantised."
        )
    keys.only("hidden_act", "silu")
    heads = keys.get("num_attention_heads", int)
    layers = keys.get("num_hidden_layers", int)
    settings = dict(
        vocab_size=keys.get("vocab_size", int),
        num_layers=layers,
        width=keys.get("hidden_size", int),
        num_heads=heads,
        num_kv_heads=keys.optional("num_key_value_heads", int, kv_heads) or heads,
        head_dim=keys.get("head_dim", int, None),
        hidden=keys.get("intermediate_size", int),
        qk_norm=False,
        tied_embeddings=keys.get("tie_word_embeddings", bool, False),
        norm_eps=keys.get("rms_norm_eps", float, eps),
        rope=rope or read_rope(keys, theta),
    )
    return Skeleton(layers, settings)


def dense(layers: int) -> MoEConfig:
    """A model without experts."""
    return MoEConfig(
        num_experts=1, top_k=1, first_dense=layers, dropless=True, z_loss=0.0, aux_loss=0.0
    )


def with_aux_loss(moe: MoEConfig, coefficient: float) -> MoEConfig:
    """The same experts with transformers' load-balancing loss, which sums over the K choices where
    the Switch loss takes their mean.
    """
    return dataclasses.replace(moe, aux_loss=coefficient * moe.top_k, aux_over="model")


# Attention windows


def windows(window: int | None, full: Iterable[int], layers: int) -> dict[str, Any]:
    """The settings of a model whose layers look back `window` tokens, except the layers in
    `full`.
    """
    full = tuple(sorted(full))
    if window is None or len(full) == layers:
        return {"sliding_window": None}
    return {"sliding_window": window, "full_layers": full}


def listed_windows(
    keys: Keys, window: int | None, full: Iterable[int], layers: int
) -> dict[str, Any]:
    """`windows` by the list `layer_types`; without one, `full` are the layers without a window."""
    kinds = keys.get("layer_types", list, None)
    if kinds is not None:
        if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise keys.refuse(
                "layer_types",
                f"is not supported, only {layers} times full_attention or sliding_attention",
            )
        full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        if window is None and len(full) < layers:
            raise keys.refuse(
                "layer_types", "has sliding_attention, but no sliding_window is in use"
            )
    return windows(window, full, layers)


def used_window(keys: Keys) -> int | None:
    """Qwen's `sliding_window`, which counts with `use_sliding_window` alone."""
    window = keys.optional("sliding_window", int, 4096)
    return window if keys.get("use_sliding_window", bool, False) else None


# Rotary embedding


def read_rope(keys: Keys, theta: float = 10_000.0) -> RopeConfig:
    """Rotation and its length extension, from `rope_theta` and `rope_scaling` or from
    `rope_parameters`. Raises UserError where both are there and differ.
    """
    sections = _rope_sections(keys)
    ropes = [_rope(keys, section, theta) for section in sections]
    scales = {section.values.get("mscale_all_dim") for section in sections}
    if ropes[0] != ropes[-1] or len(scales) > 1:
        raise keys.refuse(
            "rope_parameters",
            "describes another rotation than rope_scaling: remove the one that is not meant",
        )
    keys.get("rope_theta", float, theta)  # one that rope_parameters overrides is taken too
    keys.get("partial_rotary_factor", float, None)
    return ropes[0]


def _rope(keys: Keys, scaling: Keys, theta: float) -> RopeConfig:
    """The rotation by one of the objects that may describe it."""
    kind = _rope_kind(scaling)
    context = keys.get("max_position_embeddings", int)
    settings: dict[str, Any] = dict(
        scaling=_ROPES[kind],
        theta=scaling.get("rope_theta", float, None) or keys.get("rope_theta", float, theta),
        fraction=scaling.get("partial_rotary_factor", float, None)
        or keys.get("partial_rotary_factor", float, None)
        or 1.0,
    )
    original = keys.get("original_max_position_embeddings", int, None) or scaling.get(
        "original_max_position_embeddings", int, None
    )
    if original is not None and original < 1:
        raise scaling.refuse("original_max_position_embeddings", "is no length")
    scaling.harmless("finetuned", *_ALL_ROPE_KEYS)
    if kind != "default":
        # The dynamic kind stretches beyond the context that the config states, whatever the
        # original one was.
        settings["original_length"] = context if kind == "dynamic" else original or context
        settings["factor"] = _factor(keys, scaling, kind)
    if kind == "llama3":
        settings |= {
            key: scaling.get(key, float) for key in ("low_freq_factor", "high_freq_factor")
        }
    if kind == "yarn":
        settings |= _yarn(scaling, settings["factor"])
    return RopeConfig(**settings)


def rope_scaling(keys: Keys) -> tuple[Keys, str]:
    """The object that describes the rotation, by its old or its new name, and its kind."""
    scaling = _rope_sections(keys)[0]
    return scaling, _rope_kind(scaling)


def rope_factor(keys: Keys) -> float:
    """How many times longer the context may be."""
    return _factor(keys, *rope_scaling(keys))


def _rope_sections(keys: Keys) -> list[Keys]:
    """The objects that describe the rotation: by the old name, by the new one, or by both."""
    old, new = keys.section("rope_scaling"), keys.section("rope_parameters")
    return [old, new] if old.values and new.values else [old if old.values else new]


def _rope_kind(scaling: Keys) -> str:
    name = "rope_type" if scaling.values.get("rope_type") is not None else "type"
    scaling.only(name, *_ROPES)
    scaling.harmless("rope_type", "type")
    return scaling.values.get(name) or "default"


def _factor(keys: Keys, scaling: Keys, kind: str) -> float:
    """How many times longer the context may be; null with yarn takes the ratio of the two
    lengths.
    """
    if kind == "yarn" and scaling.values.get("factor") is None:
        original = keys.get("original_max_position_embeddings", int, None) or scaling.get(
            "original_max_position_embeddings", int
        )
        scaling.harmless("factor")
        if original < 1:
            raise scaling.refuse("original_max_position_embeddings", "is no length")
        return keys.get("max_position_embeddings", int) / original
    return scaling.get("factor", float)


# What the kinds of scaling know between them: a key of another kind than the one in use does
# nothing.
_ALL_ROPE_KEYS = [
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
]


def _yarn(scaling: Keys, factor: float) -> dict[str, Any]:
    attention_factor = scaling.get("attention_factor", float, None)
    scale, scale_all = (
        scaling.get("mscale", float, None),
        scaling.get("mscale_all_dim", float, None),
    )
    if attention_factor is None and scale and scale_all:
        attention_factor = yarn_scale(factor, scale) / yarn_scale(factor, scale_all)
    return dict(
        attention_factor=attention_factor,
        beta_fast=scaling.get("beta_fast", float, None) or 32.0,
        beta_slow=scaling.get("beta_slow", float, None) or 1.0,
        truncate=scaling.get("truncate", bool, True),
    )


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor on attention for a context `factor` times longer (Peng et al., 2023)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
