"""A Hugging Face config for a model of our own: the family that it fits, or the setting that none
can say.

The config is written, read back as anyone's, and compared: whatever changes the arithmetic of a
forward pass must have come through.
"""

from __future__ import annotations

from typing import Any

from moe_jax.config.model import ModelConfig, MoEConfig, RopeConfig
from moe_jax.errors import UserError
from moe_jax.hf.config import map_config
from moe_jax.hf.families import FAMILIES
from moe_jax.models.layer_pattern import count_moe_layers, layer_kinds

# Settings that a forward pass depends on; what spans several settings is compared by what follows
# from them.
_MODEL = [
    "num_layers",
    "width",
    "num_heads",
    "num_kv_heads",
    "qk_norm",
    "qkv_bias",
    "out_bias",
    "mlp_bias",
    "sinks",
    "clip_qkv",
    "attention_scale",
    "latent",
    "tied_embeddings",
    "norm_eps",
]
_MOE = [
    "num_experts",
    "top_k",
    "hidden",
    "score",
    "normalize",
    "routed_scale",
    "route_by",
    "num_groups",
    "top_groups",
    "shared_gate",
    "router_bias",
    "expert_bias",
    "swiglu_limit",
    "temperature",
    "bias_rate",
]
_ROPE = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_length"),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_length", "beta_fast", "beta_slow", "truncate", "attention_factor"),
}


def config_of(
    model: ModelConfig, moe: MoEConfig, vocab_size: int, context: int, eos_id: int | None = None
) -> tuple[str, dict[str, Any]]:
    """(family, config.json) of a model trained here, which reads at most `context` tokens.

    transformers drops no token, whatever the capacity in training was. Raises UserError naming the
    setting that the closest family cannot express.
    """
    if model.forecasts:
        raise UserError(
            "A forecaster cannot be exported: no Hugging Face family has its mixture; moe-jax "
            "forecast opens the run itself."
        )
    family = _closest(model, moe)
    config = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "max_position_embeddings": context,
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_width,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "rope_theta": model.rope.theta,
        "rope_scaling": _rope_scaling(model.rope),
    }
    config |= _of_family(family, model, moe)
    _, read_model, read_moe = map_config(config, f"The {family} config for this model")
    _compare(family, (model, moe), (read_model, read_moe))
    return family, config


def _closest(model: ModelConfig, moe: MoEConfig) -> str:
    """The family that differs least; `_compare` has the last word."""
    normed = model.qk_norm and model.qk_norm_over
    if not count_moe_layers(model, moe):
        return "qwen3" if normed else "mistral" if model.sliding_window else "llama"
    if normed:
        return "qwen3_moe" if normed == "head" else "olmoe"
    return "qwen2_moe" if moe.shared_gate else "mixtral"


def _of_family(family: str, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """The keys that not all families have."""
    kinds = layer_kinds(model, moe)
    window: dict[str, Any] = {"sliding_window": model.sliding_window}
    used = window | {"use_sliding_window": model.sliding_window is not None}
    listed = used | {
        "layer_types": ["sliding_attention" if kind.window else "full_attention" for kind in kinds]
    }
    bias: dict[str, Any] = {"attention_bias": model.qkv_bias}
    losses = (
        count_moe_layers(model, moe) if moe.aux_over == "layer" else 1
    )  # that add up, of the same size where layers are alike
    routed: dict[str, Any] = {
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.aux_loss * losses / moe.top_k,
        "output_router_logits": False,
    }
    normalised: dict[str, Any] = {
        "num_experts": moe.num_experts,
        "norm_topk_prob": moe.normalize == "after",
    }
    qwen = routed | normalised | {"moe_intermediate_size": moe.hidden, "decoder_sparse_step": 1}
    qwen |= {"mlp_only_layers": [layer for layer, kind in enumerate(kinds) if not kind.moe]}
    shared: dict[str, Any] = {
        "shared_expert_intermediate_size": moe.shared_width,
        "qkv_bias": model.qkv_bias,
    }
    of_experts: dict[str, Any] = {"intermediate_size": moe.hidden}
    noise: dict[str, Any] = {
        "num_local_experts": moe.num_experts,
        "router_jitter_noise": moe.input_noise,
    }
    return {
        "llama": bias | {"mlp_bias": model.mlp_bias},
        "mistral": window,
        "qwen3": bias | listed,
        "mixtral": window | routed | of_experts | noise,
        "olmoe": bias | routed | normalised | of_experts | {"clip_qkv": model.clip_qkv},
        "qwen2_moe": listed | qwen | shared,
        "qwen3_moe": bias | used | qwen,
    }[family]


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    if rope.scaling == "yarn":
        scaling |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
        }
        scaling |= (
            {} if rope.attention_factor is None else {"attention_factor": rope.attention_factor}
        )
    return scaling | (
        {"original_max_position_embeddings": rope.original_length}
        if rope.scaling in ("llama3", "yarn")
        else {}
    )


def _compare(
    family: str, ours: tuple[ModelConfig, MoEConfig], theirs: tuple[ModelConfig, MoEConfig]
) -> None:
    """Raises UserError for the first setting that did not come through."""
    there = _facts(*theirs)
    for name, value in _facts(*ours).items():
        if value != there.get(name, value):
            raise UserError(
                f"{name}={value!r} cannot be exported: {family}, the closest Hugging Face family, "
                f"has {there[name]!r} there."
            )


def _facts(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What decides the arithmetic, by the name of the setting."""
    kinds = layer_kinds(model, moe)
    facts = {f"model.{name}": getattr(model, name) for name in _MODEL}
    facts |= {
        f"model.rope.{name}": getattr(model.rope, name)
        for name in ("theta", "fraction", "scaling", *_ROPE[model.rope.scaling])
    }
    facts |= {
        "model.head_dim": model.head_width,
        "model.sliding_window": [kind.window for kind in kinds],
    }
    facts["moe.dense_layers"] = [layer for layer, kind in enumerate(kinds) if not kind.moe]
    if model.qk_norm:
        facts["model.qk_norm_over"] = model.qk_norm_over
    if not all(kind.moe for kind in kinds):
        facts["model.hidden"] = model.hidden
    if any(kind.moe for kind in kinds):
        facts |= {f"moe.{name}": getattr(moe, name) for name in _MOE} | {
            "moe.shared_experts": moe.shared_width
        }
    return facts
