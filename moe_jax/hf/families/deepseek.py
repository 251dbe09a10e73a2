"""What DeepSeek-V2 and V3 share: multi-head latent attention, leading dense layers, shared
experts.
"""

from __future__ import annotations

from typing import Any

from moe_jax.config.model import LatentConfig, ModelConfig
from moe_jax.hf.config_fields import rope_factor, rope_scaling, skeleton, yarn_scale
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.tensor_names import ATTENTION, EXPERTS, FEED_FORWARD, Names, Stored


def read_model(keys: Keys) -> ModelConfig:
    """Everything but the experts."""
    base = skeleton(keys)
    keys.harmless("qk_head_dim")  # head_dim, too, only repeats a part of the sizes below
    keys.only("mlp_bias", False)
    if base.settings["rope"].fraction != 1:
        raise keys.refuse(
            "partial_rotary_factor", "is not supported, as qk_rope_head_dim says what is rotated"
        )
    latent = LatentConfig(
        kv_rank=keys.get("kv_lora_rank", int),
        q_rank=keys.optional("q_lora_rank", int, 1536),
        rope_width=keys.get("qk_rope_head_dim", int),
        value_width=keys.get("v_head_dim", int),
    )
    plain = keys.get("qk_nope_head_dim", int)
    bias = keys.get("attention_bias", bool, False)
    settings = base.settings | dict(
        head_dim=plain,
        latent=latent,
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=_attention_scale(keys, plain + latent.rope_width),
    )
    return ModelConfig(**settings)


def _attention_scale(keys: Keys, width: int) -> float | None:
    """With a length extension, `mscale_all_dim` raises the scores; null is 1/sqrt(width)."""
    scaling, kind = rope_scaling(keys)
    weight = scaling.get("mscale_all_dim", float, None)
    if kind == "default" or not weight:
        return None
    return width**-0.5 * yarn_scale(rope_factor(keys), weight) ** 2


def read_experts(
    keys: Keys, layers: int, *, first_dense: int, shared: int, scale: float
) -> dict[str, Any]:
    """Settings of MoEConfig that both versions have; the keywords are what absent keys mean."""
    first = keys.optional("first_k_dense_replace", int, first_dense) or 0
    every = keys.get("moe_layer_freq", int, 1) or 1
    # The balance loss of the original training code, which transformers does not compute.
    alpha, within = keys.get("aux_loss_alpha", float, None) or 0.0, keys.get("seq_aux", bool, True)
    keys.only("ep_size", 1)
    return dict(
        num_experts=keys.get("n_routed_experts", int),
        top_k=keys.get("num_experts_per_tok", int),
        hidden=keys.get("moe_intermediate_size", int),
        first_dense=min(first, layers),
        dense_layers=tuple(layer for layer in range(first, layers) if layer % every),
        shared_experts=keys.optional("n_shared_experts", int, shared) or 0,
        routed_scale=keys.get("routed_scaling_factor", float, scale),
        dropless=True,
        z_loss=0.0,
        aux_loss=0.0 if within else alpha,
        sequence_aux_loss=alpha if within else 0.0,
    )


def latent_names(interleaved: bool) -> Names:
    """The name table; `interleaved` says how rotated pairs are stored."""
    latent: Names = {
        "attention/query": Stored("self_attn.q_proj.weight", interleaved=interleaved),
        "attention/query_down": "self_attn.q_a_proj.weight",
        "attention/query_down_bias": "self_attn.q_a_proj.bias",
        "attention/query_norm/scale": "self_attn.q_a_layernorm.weight",
        "attention/query_up": Stored("self_attn.q_b_proj.weight", interleaved=interleaved),
        "attention/kv_down": Stored("self_attn.kv_a_proj_with_mqa.weight", interleaved=interleaved),
        "attention/kv_down_bias": Stored(
            "self_attn.kv_a_proj_with_mqa.bias", interleaved=interleaved
        ),
        "attention/kv_norm/scale": "self_attn.kv_a_layernorm.weight",
        "attention/kv_up": "self_attn.kv_b_proj.weight",
        "mlp/shared_gate_up": (
            "mlp.shared_experts.gate_proj.weight",
            "mlp.shared_experts.up_proj.weight",
        ),
        "mlp/shared_down": "mlp.shared_experts.down_proj.weight",
    }
    return ATTENTION | latent | FEED_FORWARD | EXPERTS
