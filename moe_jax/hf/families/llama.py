"""Llama, TinyLlama and what else follows Llama 2 and 3: dense, grouped-query attention."""

from __future__ import annotations

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.hf.config_fields import dense, skeleton
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.families.base import Family
from moe_jax.hf.tensor_names import ATTENTION, FEED_FORWARD


def read(keys: Keys) -> tuple[ModelConfig, MoEConfig]:
    """Both kinds of bias are optional."""
    base = skeleton(keys)
    bias = keys.get("attention_bias", bool, False)
    return ModelConfig(
        **base.settings, qkv_bias=bias, out_bias=bias, mlp_bias=keys.get("mlp_bias", bool, False)
    ), dense(base.layers)


FAMILY = Family("llama", "LlamaForCausalLM", read, lambda config: ATTENTION | FEED_FORWARD)
