"""OLMoE: queries and keys are normalised over the whole width, then clipped."""

from __future__ import annotations

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.hf.config_fields import skeleton, with_aux_loss
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.families.base import Family
from moe_jax.hf.tensor_names import ATTENTION, EXPERTS, FUSED_EXPERTS, HEAD_NORMS


def read(keys: Keys) -> tuple[ModelConfig, MoEConfig]:
    """`intermediate_size` is the experts'; there is no dense layer."""
    base = skeleton(keys, eps=1e-5)
    if (base.settings["head_dim"] or 0) * base.settings["num_heads"] not in (
        0,
        base.settings["width"],
    ):
        raise keys.refuse("head_dim", "is not supported, only hidden_size / num_attention_heads")
    bias = keys.get("attention_bias", bool, False)
    settings = base.settings | dict(
        qk_norm=True,
        qk_norm_over="width",
        qkv_bias=bias,
        out_bias=bias,
        clip_qkv=keys.get("clip_qkv", float, None),
    )
    model = ModelConfig(**settings)
    moe = MoEConfig(
        num_experts=keys.get("num_experts", int),
        top_k=keys.get("num_experts_per_tok", int, 8),
        hidden=model.hidden,
        normalize="after" if keys.get("norm_topk_prob", bool, False) else "before",
        dropless=True,
        z_loss=0.0,
    )
    return model, with_aux_loss(moe, keys.get("router_aux_loss_coef", float, 0.01))


FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    read,
    lambda config: ATTENTION | HEAD_NORMS | EXPERTS,
    fused=FUSED_EXPERTS,
)
