"""T5's encoder and decoder, over inputs that are embedded already. Layers are stacked and
scanned.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.chronos.config import StackConfig
from moe_jax.models.chronos.layers import ReluFeedForward, UnscaledAttention, stack_norm
from moe_jax.models.chronos.relative_bias import RelativeBias
from moe_jax.ops.loops import scan
from moe_jax.utils.annotations import Array, Bool, Float


class EncoderBlock(nnx.Module):
    """Attention to all observed positions, then a feed-forward part."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.attention_norm = stack_norm(config, rngs)
        self.attention = UnscaledAttention(config, rngs=rngs)
        self.mlp_norm = stack_norm(config, rngs)
        self.mlp = ReluFeedForward(config, rngs=rngs)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        mask_BS: Bool[Array, "B S"],
        bias_HSM: Float[Array, "H S S"],
    ) -> Float[Array, "B S D"]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), mask_BS[:, None], bias_HSM)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


class DecoderBlock(nnx.Module):
    """Attention to earlier tokens, attention to the encoder's states, then a feed-forward part: a
    dense one, or the module that it is given.
    """

    def __init__(self, config: StackConfig, mlp: nnx.Module | None = None, *, rngs: nnx.Rngs):
        self.attention_norm = stack_norm(config, rngs)
        self.attention = UnscaledAttention(config, rngs=rngs)
        self.cross_norm = stack_norm(config, rngs)
        self.cross = UnscaledAttention(config, rngs=rngs)
        self.mlp_norm = stack_norm(config, rngs)
        self.mlp: Any = ReluFeedForward(config, rngs=rngs) if mlp is None else mlp

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        states_BMD: Float[Array, "B M D"],
        mask_BM: Bool[Array, "B M"],
        bias_HSS: Float[Array, "H S S"],
    ) -> Float[Array, "B S D"]:
        x_BSD = self.attend(x_BSD, states_BMD, mask_BM, bias_HSS)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))

    def attend(
        self, x_BSD: jax.Array, states_BMD: jax.Array, mask_BM: jax.Array, bias_HSS: jax.Array
    ) -> jax.Array:
        """The layer up to its feed-forward part."""
        length = x_BSD.shape[1]
        past_BSS = jnp.tril(jnp.ones((1, length, length), bool))
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), past_BSS, bias_HSS)
        return x_BSD + self.cross.read(self.cross_norm(x_BSD), states_BMD, mask_BM)


class Encoder(nnx.Module):
    """Embedded inputs in, normalised states out."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.relative = relative_bias(config, causal=False, rngs=rngs)
        self.blocks = stacked(EncoderBlock, config, config.num_layers, rngs)
        self.norm = stack_norm(config, rngs)

    def __call__(
        self, x_BSD: Float[Array, "B S D"], mask_BS: Bool[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        bias_HSS = self.relative(x_BSD.shape[1], x_BSD.shape[1])
        return self.norm(through(self.blocks, x_BSD, mask_BS, bias_HSS))


class Decoder(nnx.Module):
    """Embedded tokens and an encoder's states in, normalised states out."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        self.relative = relative_bias(config, causal=True, rngs=rngs)
        self.blocks = stacked(DecoderBlock, config, config.num_decoder_layers, rngs)
        self.norm = stack_norm(config, rngs)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        states_BMD: Float[Array, "B M D"],
        mask_BM: Bool[Array, "B M"],
    ) -> Float[Array, "B S D"]:
        bias_HSS = self.relative(x_BSD.shape[1], x_BSD.shape[1])
        return self.norm(through(self.blocks, x_BSD, states_BMD, mask_BM, bias_HSS))


def relative_bias(
    config: StackConfig, *, causal: bool, std: float | None = None, rngs: nnx.Rngs
) -> RelativeBias:
    """The table of a stack, whose values start as large as T5's or with `std`."""
    std = config.init_factor * config.width**-0.5 if std is None else std
    shape = (config.buckets, config.max_distance, config.num_heads)
    return RelativeBias(*shape, std, causal=causal, rngs=rngs)


def stacked(block: Any, config: Any, layers: int, rngs: nnx.Rngs) -> Any:
    """`layers` blocks as one, whose arrays have the layers in front."""

    def make(key: jax.Array) -> Any:
        return block(config, rngs=nnx.Rngs(params=key))

    return nnx.vmap(make)(jax.random.split(rngs.params(), layers))


def through(blocks: Any, x_BSD: jax.Array, *inputs: Any) -> jax.Array:
    """States through all layers, each of which is given the same inputs."""
    graph, state = nnx.split(blocks)

    def run(x_BSD: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return nnx.merge(graph, layer)(x_BSD, *inputs), None

    return scan(run, x_BSD, state)[0]
