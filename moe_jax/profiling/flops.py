"""Figures that speed is judged by: the matmul rate of this machine, the FLOPs and bytes that a
model needs at least, and what its compiled program spends. Needs jax, flax, optax and numpy alone.

FLOPs count a multiplication and an addition as two. docs/benchmarks.md says how the figures are
used.
"""

from __future__ import annotations

import numpy as np

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.models.layer_pattern import layer_kinds
from moe_jax.models.parameters import parameters

# FLOPs of a training step over those of its forward pass: each matmul has two gradients.
TRAINING = 3


# What the model needs.


def mean_visible(seq_len: int, window: int | None) -> float:
    """Keys that a query of a `seq_len` document sees on average under the causal mask and a
    window.
    """
    return float(np.mean(np.minimum(np.arange(1, seq_len + 1), window or seq_len)))


def sequence_tokens(model: ModelConfig, seq_len: int) -> int:
    """Tokens of a sequence; a forecaster's are the patches of a context and REG."""
    return model.forecast.patches if model.forecasts else seq_len


def model_flops(model: ModelConfig, moe: MoEConfig, vocab_size: int, seq_len: int) -> float:
    """FLOPs of the forward pass per token, for sequences that are one document of `seq_len` tokens;
    training is 3 times this.

    Two for each weight of a matmul that the token passes (router, its `top_k` experts, shared
    experts, attention, dense layers, head; looking up an embedding is free) and two matmuls with
    the keys it sees. Recomputation, padding, norms, biases and softmax do not count, and dropped
    choices count as if they were computed.
    """
    if model.forecasts:
        return _forecaster_flops(model, moe)
    # A head of its own is among the weights.
    flops = 2.0 * vocab_size * model.width * model.tied_embeddings
    for path, parameter in parameters(model, moe, vocab_size).items():
        if path != "embedding" and parameter.path.is_matrix:
            flops += 2 * parameter.active_size(moe)
    widths = model.num_heads * (model.query_width + model.value_width)
    return flops + sum(
        2 * widths * mean_visible(seq_len, kind.window) for kind in layer_kinds(model, moe)
    )


def _forecaster_flops(model: ModelConfig, moe: MoEConfig) -> float:
    """As `model_flops`, per token of the encoder; the decoder and the head have one per series."""
    tokens, flops = model.forecast.patches, 0.0
    for path, parameter in parameters(model, moe, 0).items():
        within, layers = parameter.path.within, parameter.layers
        encodes = layers is not None and layers[0] < model.num_layers
        reads_states = within.startswith(("cross/key", "cross/value"))
        if path != "ends/shared" and parameter.path.is_matrix and parameter.path.name != "table":
            times = tokens if encodes or reads_states or path.startswith("ends/input_patch/") else 1
            flops += 2 * parameter.active_size(moe) * times
    pairs = model.num_layers * tokens**2 + model.forecast.decoder_layers * (tokens + 1)
    return (flops + 4 * model.num_heads * model.head_width * pairs) / tokens


def parameter_counts(model: ModelConfig, moe: MoEConfig, vocab_size: int) -> tuple[int, int]:
    """(parameters, those that one token uses): all but the experts not chosen. Empty slots and
    replicas do not count.
    """
    table = parameters(model, moe, vocab_size).values()
    return sum(one.size for one in table), sum(one.active_size(moe) for one in table)


# What the compiled program spends.
