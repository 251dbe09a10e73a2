"""Qwen1.5-MoE and Qwen2-MoE: biases on queries, keys and values, and one shared expert behind a
sigmoid gate.
"""

from __future__ import annotations

from typing import Any

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.hf.config_fields import listed_windows, skeleton, used_window, with_aux_loss
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.families.base import Family
from moe_jax.hf.tensor_names import ATTENTION, EXPERTS, FEED_FORWARD, FUSED_EXPERTS, Names


def read(keys: Keys) -> tuple[ModelConfig, MoEConfig]:
    """A window in use is in every other layer of the first `max_window_layers`."""
    base = skeleton(keys, kv_heads=16)
    last = keys.get("max_window_layers", int, 28)
    full = [layer for layer in range(base.layers) if layer % 2 or layer >= last]
    window = listed_windows(keys, used_window(keys), full, base.layers)
    model = ModelConfig(**base.settings, **window, qkv_bias=keys.get("qkv_bias", bool, True))
    shared = dict(
        shared_experts=1,
        shared_hidden=keys.get("shared_expert_intermediate_size", int),
        shared_gate=True,
    )
    moe = MoEConfig(**qwen_experts(keys, base.layers), **shared)
    return model, with_aux_loss(moe, keys.get("router_aux_loss_coef", float, 0.001))


def qwen_experts(keys: Keys, layers: int) -> dict[str, Any]:
    """Settings of the routed experts, as Qwen2-MoE and Qwen3-MoE name them."""
    number = "num_local_experts" if "num_local_experts" in keys.values else "num_experts"
    experts = keys.get(number, int)
    if number == "num_local_experts":
        keys.only("num_experts", experts)
    top_k = keys.get("num_experts_per_tok", int)
    dense_layers = tuple(keys.get("mlp_only_layers", list, None) or ())
    if not all(isinstance(layer, int) for layer in dense_layers):
        raise keys.refuse("mlp_only_layers", "must be a list of layer numbers")
    return dict(
        num_experts=max(experts, 1),
        top_k=top_k if experts else 1,
        hidden=keys.get("moe_intermediate_size", int),
        first_dense=0 if experts else layers,
        every=keys.get("decoder_sparse_step", int, 1),
        dense_layers=dense_layers,
        normalize="after" if keys.get("norm_topk_prob", bool, False) else "before",
        dropless=True,
        z_loss=0.0,
    )


SHARED: Names = {
    "mlp/shared_gate_up": (
        "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight",
    ),
    "mlp/shared_down": "mlp.shared_expert.down_proj.weight",
    "mlp/shared_gate": "mlp.shared_expert_gate.weight",
}
FAMILY = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    read,
    lambda config: ATTENTION | FEED_FORWARD | EXPERTS | SHARED,
    fused=FUSED_EXPERTS,
)
