"""Qwen3-MoE: each query and key head is normalised, no shared expert."""

from __future__ import annotations

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.hf.config_fields import skeleton, used_window, windows, with_aux_loss
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.families.base import Family
from moe_jax.hf.families.qwen2_moe import qwen_experts
from moe_jax.hf.tensor_names import ATTENTION, EXPERTS, FEED_FORWARD, FUSED_EXPERTS, HEAD_NORMS


def read(keys: Keys) -> tuple[ModelConfig, MoEConfig]:
    """A window in use is in all layers, whatever `max_window_layers` says."""
    base = skeleton(keys, kv_heads=4)
    keys.harmless("max_window_layers")
    bias = keys.get("attention_bias", bool, False)
    settings = base.settings | dict(qk_norm=True, qkv_bias=bias, out_bias=bias)
    model = ModelConfig(**settings, **windows(used_window(keys), (), base.layers))
    return model, with_aux_loss(
        MoEConfig(**qwen_experts(keys, base.layers)), keys.get("router_aux_loss_coef", float, 0.001)
    )


FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    read,
    lambda config: ATTENTION | HEAD_NORMS | FEED_FORWARD | EXPERTS,
    fused=FUSED_EXPERTS,
)
