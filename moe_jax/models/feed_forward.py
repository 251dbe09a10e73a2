"""The dense feed-forward part of a layer."""

from __future__ import annotations

from flax import nnx

from moe_jax.config.model import ModelConfig
from moe_jax.moe.experts import gated_projection
from moe_jax.parallel.collectives import psum
from moe_jax.parallel.sharding import axes_of, bias, gather, param
from moe_jax.utils.annotations import Array, Float


class FeedForward(nnx.Module):
    """Dense SwiGLU; its hidden dimension is sharded over `tensor`."""

    def __init__(self, config: ModelConfig, out_std: float, *, rngs: nnx.Rngs):
        width, hidden = config.width, config.hidden
        self.gate_up = param(rngs, (width, 2, hidden), ("width", "gate_up", "hidden"), width**-0.5)
        self.down = param(rngs, (width, hidden), ("width", "hidden"), out_std)
        self.biased = config.mlp_bias
        if config.mlp_bias:
            self.gate_up_bias = bias((2, hidden), ("gate_up", "hidden"))
            self.down_bias = bias((width,), ("norm",))

    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        y_BSD = gated_projection(
            x_BSD, self.gate_up, self.down, self.gate_up_bias if self.biased else None
        )
        y_BSD = psum(y_BSD, axes_of(self.down, "hidden"))
        return y_BSD + gather(self.down_bias, y_BSD.dtype) if self.biased else y_BSD
