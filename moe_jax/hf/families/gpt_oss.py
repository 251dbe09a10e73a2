"""gpt-oss: biases throughout, attention sinks, alternating windows, clamped SwiGLU, experts in
MXFP4.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_jax.config.model import ModelConfig, MoEConfig, RopeConfig
from moe_jax.hf.config_fields import listed_windows, read_rope, skeleton, with_aux_loss
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.families.base import Family
from moe_jax.hf.tensor_names import ATTENTION, Names, Stored

# Without any description of the rotation, the config means this one.
ROPE = RopeConfig(scaling="yarn", factor=32.0, original_length=4096, truncate=False)


def read(keys: Keys) -> tuple[ModelConfig, MoEConfig]:
    """Every other layer, the first included, has the window unless `layer_types` says otherwise."""
    described = keys.values.get("rope_scaling") or keys.values.get("rope_parameters")
    theta = keys.get("rope_theta", float, 150_000.0)
    rope = read_rope(keys, theta) if described else dataclasses.replace(ROPE, theta=theta)
    base = skeleton(keys, eps=1e-5, kv_heads=8, rope=rope, quantised=True)
    keys.only("swiglu_alpha", 1.702)
    top_k = keys.get("num_experts_per_tok", int)
    keys.only("experts_per_token", top_k)
    keys.harmless("initial_context_length")
    if keys.section("quantization_config").values:
        keys.section("quantization_config").only("quant_method", "mxfp4")
        keys.section("quantization_config").harmless("modules_to_not_convert")
    bias = keys.get("attention_bias", bool, True)
    window = listed_windows(
        keys, keys.optional("sliding_window", int, 128), range(1, base.layers, 2), base.layers
    )
    settings = base.settings | dict(
        head_dim=keys.optional("head_dim", int, 64), qkv_bias=bias, out_bias=bias, sinks=True
    )
    model = ModelConfig(**settings, **window)
    moe = MoEConfig(
        num_experts=keys.get("num_local_experts", int),
        top_k=top_k,
        hidden=model.hidden,
        router_bias=True,
        expert_bias=True,
        swiglu_limit=keys.get("swiglu_limit", float, 7.0),
        dropless=True,
        z_loss=0.0,
    )
    return model, with_aux_loss(moe, keys.get("router_aux_loss_coef", float, 0.001))


def names(config: dict[str, Any]) -> Names:
    """All experts of a layer are one tensor, gate and up alternating; inputs first, except with
    MXFP4.
    """
    mxfp4 = bool(config.get("quantization_config"))
    gate_up, down = "slots slot_width (expert_hidden gate_up)", "slots expert_hidden slot_width"
    if mxfp4:
        gate_up, down = "slots (expert_hidden gate_up) slot_width", "slots slot_width expert_hidden"
    experts: Names = {
        "attention/sinks": "self_attn.sinks",
        "mlp/router/weight": "mlp.router.weight",
        "mlp/router/bias": "mlp.router.bias",
        "mlp/experts/gate_up": Stored("mlp.experts.gate_up_proj", gate_up, mxfp4=mxfp4),
        "mlp/experts/down": Stored("mlp.experts.down_proj", down, mxfp4=mxfp4),
        "mlp/experts/gate_up_bias": Stored(
            "mlp.experts.gate_up_proj_bias", "slots (expert_hidden gate_up)"
        ),
        "mlp/experts/down_bias": Stored("mlp.experts.down_proj_bias", "slots slot_norm"),
    }
    return ATTENTION | experts


FAMILY = Family("gpt_oss", "GptOssForCausalLM", read, names)
