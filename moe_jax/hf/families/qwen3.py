"""Qwen3, dense: each query and key head is normalised."""

from __future__ import annotations

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.hf.config_fields import dense, listed_windows, skeleton, used_window
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.families.base import Family
from moe_jax.hf.tensor_names import ATTENTION, FEED_FORWARD, HEAD_NORMS


def read(keys: Keys) -> tuple[ModelConfig, MoEConfig]:
    """Heads are 128 wide unless the config says otherwise; a window in use spares the first
    `max_window_layers`.
    """
    base = skeleton(keys, kv_heads=32)
    bias = keys.get("attention_bias", bool, False)
    full = range(min(keys.get("max_window_layers", int, 28), base.layers))
    settings = base.settings | dict(
        qk_norm=True, head_dim=keys.get("head_dim", int, 128), qkv_bias=bias, out_bias=bias
    )
    return ModelConfig(
        **settings, **listed_windows(keys, used_window(keys), full, base.layers)
    ), dense(base.layers)


FAMILY = Family(
    "qwen3", "Qwen3ForCausalLM", read, lambda config: ATTENTION | HEAD_NORMS | FEED_FORWARD
)
