"""Mistral 7B: dense, with a sliding window in all layers unless the config says null."""

from __future__ import annotations

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.hf.config_fields import dense, skeleton, windows
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.families.base import Family
from moe_jax.hf.tensor_names import ATTENTION, FEED_FORWARD


def read(keys: Keys) -> tuple[ModelConfig, MoEConfig]:
    """An absent `sliding_window` is 4096."""
    base = skeleton(keys, kv_heads=8)
    window = windows(keys.optional("sliding_window", int, 4096), (), base.layers)
    return ModelConfig(**base.settings, **window), dense(base.layers)


FAMILY = Family("mistral", "MistralForCausalLM", read, lambda config: ATTENTION | FEED_FORWARD)
