"""DeepSeek-V2: softmax routing, of all experts or of those in the best groups."""

from __future__ import annotations

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.families.base import Family
from moe_jax.hf.families.deepseek import latent_names, read_experts, read_model
from moe_jax.hf.tensor_names import FUSED_EXPERTS


def read(keys: Keys) -> tuple[ModelConfig, MoEConfig]:
    """Groups count with `topk_method` group_limited_greedy alone."""
    model = read_model(keys)
    settings = read_experts(keys, model.num_layers, first_dense=0, shared=2, scale=1.0)
    keys.only("scoring_func", "softmax")
    # The original code rescales the weights, but drops routed_scaling_factor then; transformers
    # ignores the key.
    keys.only("norm_topk_prob", False)
    keys.only("topk_method", "greedy", "group_limited_greedy")
    groups, best = (
        keys.optional("n_group", int, None) or 1,
        keys.optional("topk_group", int, None) or 1,
    )
    if keys.values.get("topk_method") != "group_limited_greedy":
        groups = best = 1
    return model, MoEConfig(**settings, normalize="before", num_groups=groups, top_groups=best)


FAMILY = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    read,
    lambda config: latent_names(interleaved=True),
    fused=FUSED_EXPERTS,
)
