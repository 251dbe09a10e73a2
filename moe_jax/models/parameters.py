"""The parameter tree of the model as a table: which leaves a configuration has, and the dimensions
of each.

Dimensions are letters of the legend in docs/architecture.md, so that shapes, and the order of
dimensions in files, can be derived from them. Further letters: C is 2 (gate and up), N the
unrotated part of a latent head with its value (U) beside it, X and Y the ranks of queries and of
keys and values, Z the rank Y with the rotated key beside it, M the hidden width of the shared
experts, "1" is 1.
"""

from __future__ import annotations

from typing import NamedTuple

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.models.layer_pattern import LayerKind, layer_kinds, stack_layers

Dims = tuple[str, ...]


class Leaf(NamedTuple):
    """One leaf of the tree: an array with a leading dimension of `layers`, or one of the whole
    model (no layers).
    """

    name: str  # within its block, or in the tree when it is of the whole model
    dims: Dims  # without the layers
    layers: tuple[int, ...] | None


def sizes(model: ModelConfig, moe: MoEConfig, vocab_size: int) -> dict[str, int]:
    """The size of each dimension."""
    latent = model.latent
    return {
        "D": model.width,
        "V": vocab_size,
        "H": model.num_heads,
        "G": model.num_kv_heads,
        "Q": model.query_width,
        "U": model.value_width,
        "N": model.head_width + model.value_width,
        "X": latent.q_rank or 0,
        "Y": latent.kv_rank,
        "Z": latent.kv_rank + latent.rope_width,
        "F": model.hidden,
        "I": moe.hidden,
        "M": moe.shared_width,
        "E": moe.num_experts,
        "P": moe.num_experts,
        "C": 2,
        "1": 1,
    }


def leaves(model: ModelConfig, moe: MoEConfig) -> dict[str, Leaf]:
    """Every leaf of the tree by its path, such as `stacks/0/blocks/1/mlp/experts/gate_up`."""
    found = {
        "embedding": Leaf("embedding", ("D", "V"), None),
        "final_norm/scale": Leaf("final_norm/scale", ("D",), None),
    }
    if not model.tied_embeddings:
        found["head"] = Leaf("head", ("D", "V"), None)
    start = 0
    for i, (kinds, repeats) in enumerate(stack_layers(layer_kinds(model, moe))):
        for j, kind in enumerate(kinds):
            layers = tuple(start + repeat * len(kinds) + j for repeat in range(repeats))
            for name, dims in block_dims(model, moe, kind).items():
                found[f"stacks/{i}/blocks/{j}/{name}"] = Leaf(name, dims, layers)
        start += len(kinds) * repeats
    return found


def block_dims(model: ModelConfig, moe: MoEConfig, kind: LayerKind) -> dict[str, Dims]:
    """The leaves of one layer and their dimensions."""
    found = {"attention_norm/scale": "D", "mlp_norm/scale": "D"}
    found |= _latent_attention(model) if model.latent.kv_rank else _attention(model)
    found |= _experts(moe) if kind.moe else _feed_forward(model)
    return {name: tuple(dims.split()) for name, dims in found.items()}


def _attention(model: ModelConfig) -> dict[str, str]:
    found = {
        "attention/query": "D H Q",
        "attention/key": "D G Q",
        "attention/value": "D G Q",
        "attention/out": "D H U",
    }
    if model.qkv_bias:
        found |= {
            "attention/query_bias": "H Q",
            "attention/key_bias": "G Q",
            "attention/value_bias": "G Q",
        }
    if model.qk_norm:
        over = model.qk_norm_over == "width"
        found |= {
            "attention/query_norm/scale": "H Q" if over else "Q",
            "attention/key_norm/scale": "G Q" if over else "Q",
        }
    if model.sinks:
        found["attention/sinks"] = "H"
    return found | ({"attention/out_bias": "D"} if model.out_bias else {})


def _latent_attention(model: ModelConfig) -> dict[str, str]:
    found = {
        "attention/kv_down": "D Z",
        "attention/kv_norm/scale": "Y",
        "attention/kv_up": "Y H N",
        "attention/out": "D H U",
    }
    if model.latent.q_rank:
        found |= {
            "attention/query_down": "D X",
            "attention/query_norm/scale": "X",
            "attention/query_up": "X H Q",
        }
    else:
        found["attention/query"] = "D H Q"
    if model.qkv_bias:
        found |= {"attention/kv_down_bias": "Z"} | (
            {"attention/query_down_bias": "X"} if model.latent.q_rank else {}
        )
    return found | ({"attention/out_bias": "D"} if model.out_bias else {})


def _feed_forward(model: ModelConfig) -> dict[str, str]:
    found = {"mlp/gate_up": "D C F", "mlp/down": "D F"}
    return found | ({"mlp/gate_up_bias": "C F", "mlp/down_bias": "D"} if model.mlp_bias else {})


def _experts(moe: MoEConfig) -> dict[str, str]:
    found = {
        "mlp/router/weight": "D E",
        "mlp/experts/gate_up": "P D C I",
        "mlp/experts/down": "P D I",
    }
    if moe.router_bias:
        found["mlp/router/bias"] = "E"
    if moe.expert_bias:
        found |= {"mlp/experts/gate_up_bias": "P C I", "mlp/experts/down_bias": "P D"}
    if moe.shared_width:
        found |= {"mlp/shared_gate_up": "D C M", "mlp/shared_down": "D M"}
    if moe.shared_gate:
        found["mlp/shared_gate"] = "D 1"
    return found
