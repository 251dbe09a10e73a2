"""DeepSeek-V3: sigmoid scores, a selection bias that no loss trains, and the best groups by their
two best experts.
"""

from __future__ import annotations

from typing import Any

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.families.base import Family
from moe_jax.hf.families.deepseek import latent_names, read_experts, read_model
from moe_jax.hf.tensor_names import FUSED_EXPERTS, SELECTION_BIAS, Names


def read(keys: Keys) -> tuple[ModelConfig, MoEConfig]:
    """The multi-token-prediction layers behind the last one are not part of the model."""
    keys.get("rope_interleave", bool, True)
    keys.get("num_nextn_predict_layers", int, 0)
    model = read_model(keys)
    settings = read_experts(keys, model.num_layers, first_dense=3, shared=1, scale=2.5)
    keys.only("scoring_func", "sigmoid")
    keys.only("topk_method", "noaux_tc")
    moe = MoEConfig(
        **settings,
        score="sigmoid",
        normalize="after" if keys.get("norm_topk_prob", bool, True) else "before",
        num_groups=keys.optional("n_group", int, 8) or 1,
        top_groups=keys.optional("topk_group", int, 4) or 1,
    )
    return model, moe


def names(config: dict[str, Any]) -> Names:
    """Rotated pairs are neighbours unless the config says otherwise."""
    interleaved = bool(config.get("rope_interleave", True))
    return latent_names(interleaved) | {SELECTION_BIAS: "mlp.gate.e_score_correction_bias"}


def unused(config: dict[str, Any]) -> str:
    """Tensors of the layers that predict further tokens, numbered on from the last one."""
    first = int(config["num_hidden_layers"])
    layers = range(first, first + int(config.get("num_nextn_predict_layers") or 0))
    return (
        r"model\.layers\.(" + "|".join(str(layer) for layer in layers) + r")\..*"
        if layers
        else r"$^"
    )


FAMILY = Family("deepseek_v3", "DeepseekV3ForCausalLM", read, names, unused, fused=FUSED_EXPERTS)
