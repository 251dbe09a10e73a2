"""A mixture-of-experts layer in its plainest form: every expert computes every token, a mask
selects.

Written from the definition and independent of moe_jax/moe, so that both can be wrong only by
chance.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def swiglu(x, gate_up, down):
    """[N, D] through weights [D, 2, F] and [F, D]."""
    gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
    return (gate * jax.nn.sigmoid(gate) * up) @ down


def moe_layer(params, x_ND, valid_N, top_k, bias_E=0.0, kept_NE=1.0, seen_ND=None):
    """Softmax top-k with weights rescaled to sum to 1, shared experts behind a gate; choices
    outside `kept_NE` are lost. `seen_ND` is what rows are routed by, if not by themselves.
    """
    score_NE = jax.nn.softmax((x_ND if seen_ND is None else seen_ND) @ params["router"])
    ranked_NE = jax.lax.stop_gradient(score_NE) + bias_E
    lowest_N1 = jnp.sort(ranked_NE, axis=-1)[:, -top_k, None]
    weight_NE = jnp.where(ranked_NE >= lowest_N1, score_NE, 0.0)
    weight_NE = weight_NE / jnp.sum(weight_NE, axis=-1, keepdims=True) * kept_NE * valid_N[:, None]
    y_ND = sum(
        weight_NE[:, e, None] * swiglu(x_ND, params["gate_up"][e], params["down"][e])  #
        for e in range(score_NE.shape[1])
    )
    shared_ND = swiglu(x_ND, params["shared_gate_up"], params["shared_down"])
    return y_ND + jax.nn.sigmoid(x_ND @ params["shared_gate"]) * shared_ND


def choices(params, x_ND, top_k, bias_E=0.0):
    """Experts [N, K], best first, and their scores rescaled to sum to 1."""
    score_NE = jax.nn.softmax(x_ND @ params["router"])
    _, expert_NK = jax.lax.top_k(score_NE + bias_E, top_k)
    weight_NK = jnp.take_along_axis(score_NE, expert_NK, axis=1)
    return expert_NK, weight_NK / jnp.sum(weight_NK, axis=-1, keepdims=True)
