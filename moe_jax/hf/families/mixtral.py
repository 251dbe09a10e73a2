"""Mixtral: experts in every layer, their weights renormalised over the chosen ones."""

from __future__ import annotations

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.hf.config_fields import skeleton, windows, with_aux_loss
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.families.base import Family
from moe_jax.hf.tensor_names import ATTENTION, FUSED_EXPERTS, Names


def read(keys: Keys) -> tuple[ModelConfig, MoEConfig]:
    """`intermediate_size` is the experts'; there is no dense layer."""
    base = skeleton(keys, kv_heads=8, theta=1e6, eps=1e-5)
    model = ModelConfig(
        **base.settings, **windows(keys.optional("sliding_window", int, None), (), base.layers)
    )
    moe = MoEConfig(
        num_experts=keys.get("num_local_experts", int),
        top_k=keys.get("num_experts_per_tok", int, 2),
        hidden=model.hidden,
        dropless=True,
        input_noise=keys.get("router_jitter_noise", float, 0.0),
        z_loss=0.0,
    )
    return model, with_aux_loss(moe, keys.get("router_aux_loss_coef", float, 0.001))


MIXTRAL_EXPERTS: Names = {
    "mlp/router/weight": "block_sparse_moe.gate.weight",
    "mlp/experts/gate_up": (
        "block_sparse_moe.experts.{expert}.w1.weight",
        "block_sparse_moe.experts.{expert}.w3.weight",
    ),
    "mlp/experts/down": "block_sparse_moe.experts.{expert}.w2.weight",
}
FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    read,
    lambda config: ATTENTION | MIXTRAL_EXPERTS,
    # transformers 5 calls the block `mlp`, and with the experts its router too.
    fused=FUSED_EXPERTS | {"mlp/router/weight": "mlp.gate.weight"},
)
