"""Chronos-T5: tokens of a context in, tokens of what comes next drawn one after another."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.models.chronos.config import ChronosT5Config
from moe_jax.models.chronos.stacks import Decoder, DecoderBlock, Encoder
from moe_jax.models.embedding import embed
from moe_jax.ops.attention.cached import stored_attention
from moe_jax.ops.attention.reference import MASKED
from moe_jax.ops.linear import project
from moe_jax.parallel.collectives import psum, vary, vma
from moe_jax.parallel.sharding import axes_of, gather, param
from moe_jax.utils.annotations import Array, Bool, Float, Int


class Drawing(NamedTuple):
    """How tokens are drawn, in transformers' order; 0 and 1 leave all tokens."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class _Past(NamedTuple):
    """What the paths of a layer keep: keys [B N, H, Q, M] and values [B N, H, M, Q]."""

    keys: jax.Array
    values: jax.Array


class ChronosT5(nnx.Module):
    """An encoder-decoder whose embedding is its output head too."""

    def __init__(self, config: ChronosT5Config, *, rngs: nnx.Rngs):
        self.config = config
        stack = config.stack
        shape, axes = (stack.width, config.vocab_size), ("width", "vocab")
        self.shared = param(rngs, shape, axes, stack.init_factor)
        self.encoder = Encoder(stack, rngs=rngs)
        self.decoder = Decoder(stack, rngs=rngs)

    def encode(
        self, ids_BM: Int[Array, "B M"], mask_BM: Bool[Array, "B M"]
    ) -> Float[Array, "B M D"]:
        """States of the context's tokens."""
        return self.encoder(embed(self.shared, ids_BM, jnp.float32), mask_BM)

    def logits(
        self,
        ids_BM: Int[Array, "B M"],
        mask_BM: Bool[Array, "B M"],
        labels_BT: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """Scores of each label's place, given the labels before it."""
        states_BMD = self.encode(ids_BM, mask_BM)
        given_BT = jnp.pad(labels_BT[:, :-1], ((0, 0), (1, 0)), constant_values=self.config.start)
        x_BTD = embed(self.shared, given_BT, jnp.float32)
        return self._head(self.decoder(x_BTD, states_BMD, mask_BM))

    def losses(
        self,
        ids_BM: Int[Array, "B M"],
        mask_BM: Bool[Array, "B M"],
        labels_BT: Int[Array, "B T"],
        label_mask_BT: Bool[Array, "B T"],
    ) -> Float[Array, " B"]:
        """The cross-entropy of each series' labels that are there, summed."""
        scores_BTV = jax.nn.log_softmax(self.logits(ids_BM, mask_BM, labels_BT))
        chosen_BT = jnp.take_along_axis(scores_BTV, labels_BT[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(label_mask_BT, chosen_BT, 0), axis=-1)

    def generate(
        self,
        ids_BM: Int[Array, "B M"],
        mask_BM: Bool[Array, "B M"],
        keys_B2: Any,
        *,
        steps: int,
        paths: int,
        drawing: Drawing,
    ) -> Int[Array, "B N T"]:
        """Tokens of `paths` continuations of each series, of `steps` tokens; none ends early.

        Each series draws from a key of its own, uint32 [B, 2]. The context is encoded once, and its
        paths are queries of one attention.
        """
        batch = len(ids_BM)
        key_B = jax.random.wrap_key_data(keys_B2, impl="threefry2x32")
        states_BMD = self.encode(ids_BM, mask_BM)
        graph, state = nnx.split(self.decoder.blocks)
        count = jax.tree.leaves(state)[0].shape[0]
        # Cut apart once, before the loop over steps: inside it every step would copy all weights.
        layers = [jax.tree.map(lambda a, at=at: a[at], state) for at in range(count)]
        blocks = [nnx.merge(graph, layer) for layer in layers]
        crosses = [_stored(*block.cross.keys_values(states_BMD)) for block in blocks]
        hidden_BM = jnp.where(mask_BM, 0.0, MASKED)[:, None, None]
        bias_HTT = self.decoder.relative(steps, steps)
        first_BN = vary(jnp.full((batch, paths), self.config.start, jnp.int32), vma(ids_BM))

        def step(carry: tuple[jax.Array, list[_Past]], at: jax.Array) -> tuple[Any, jax.Array]:
            token_BN, pasts = carry
            x_BND = embed(self.shared, token_BN, jnp.float32)
            row_HT = lax.dynamic_index_in_dim(bias_HTT, at, axis=1, keepdims=False)
            row_HT = jnp.where(jnp.arange(steps) <= at, row_HT, MASKED)
            after = []
            for block, past, cross in zip(blocks, pasts, crosses, strict=True):
                x_BND, past = _next_states(block, x_BND, past, at, row_HT)
                x_BND = x_BND + _look_at(block, x_BND, cross, hidden_BM)
                x_BND = x_BND + block.mlp(block.mlp_norm(x_BND))
                after.append(past)
            scores_BNV = self._head(self.decoder.norm(x_BND))
            scores_BNV = scores_BNV.at[..., self.config.bins.eos].set(-jnp.inf)
            step_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, at)
            token_BN = _draw(scores_BNV, step_key_B, drawing)
            return (token_BN, after), token_BN

        none = [_empty(cross, batch * paths, steps) for cross in crosses]
        _, tokens_TBN = lax.scan(step, (first_BN, none), jnp.arange(steps))
        return jnp.moveaxis(tokens_TBN, 0, -1)

    def _head(self, x_BTD: jax.Array) -> jax.Array:
        """Scores of all tokens, the same on all devices that hold parts of the vocabulary."""
        scaled = x_BTD * self.config.stack.width**-0.5
        scores = project(scaled, gather(self.shared, x_BTD.dtype))
        axes = axes_of(self.shared, "vocab")
        if not axes or lax.axis_size(axes) == 1:
            return psum(scores, axes)
        return lax.all_gather(scores, axes, axis=scores.ndim - 1, tiled=True, to="invarying")


def _stored(k_BMHQ: jax.Array, v_BMHQ: jax.Array) -> _Past:
    """Keys and values in the order in which `stored_attention` reads them."""
    return _Past(jnp.moveaxis(k_BMHQ, 1, 3), jnp.swapaxes(v_BMHQ, 1, 2))


def _empty(like: _Past, rows: int, places: int) -> _Past:
    """Room for the tokens of paths, typed as varying like keys of the encoder's states."""
    heads, width = like.keys.shape[1:3]
    keys = jnp.zeros((rows, heads, width, places), like.keys.dtype)
    return _Past(*vary((keys, jnp.swapaxes(keys, 2, 3)), vma(like.keys)))


def _next_states(
    block: DecoderBlock, x_BND: jax.Array, past: _Past, at: jax.Array, bias_HT: jax.Array
) -> tuple[jax.Array, _Past]:
    """Self-attention of the token at a place of each path."""
    x_R1D = x_BND.reshape(-1, 1, x_BND.shape[-1])
    inputs = block.attention_norm(x_R1D)
    new = _stored(*block.attention.keys_values(inputs))
    past = _Past(
        lax.dynamic_update_slice_in_dim(past.keys, new.keys, at, axis=3),
        lax.dynamic_update_slice_in_dim(past.values, new.values, at, axis=2),
    )
    q_R1HQ = block.attention.queries(inputs)
    seen = stored_attention(q_R1HQ, *past, bias_HT[None, :, None])
    return (x_R1D + block.attention.project_out(seen)).reshape(x_BND.shape), past


def _look_at(
    block: DecoderBlock, x_BND: jax.Array, cross: _Past, hidden_B11M: jax.Array
) -> jax.Array:
    """What paths see of their context."""
    q_BNHQ = block.cross.queries(block.cross_norm(x_BND))
    return block.cross.project_out(stored_attention(q_BNHQ, *cross, hidden_B11M))


def _draw(scores_BNV: jax.Array, key_B: jax.Array, drawing: Drawing) -> jax.Array:
    """A token for each path, i32 [B, N]."""
    size = scores_BNV.shape[-1]
    scores_BNV = scores_BNV / drawing.temperature
    values_BNK, ids_BNK = lax.top_k(scores_BNV, min(drawing.top_k or size, size))
    if drawing.top_p < 1:
        share_BNK = jax.nn.softmax(values_BNK)
        before_BNK = jnp.cumsum(share_BNK, axis=-1) - share_BNK
        values_BNK = jnp.where(before_BNK < drawing.top_p, values_BNK, -jnp.inf)
    pick_BN = jax.vmap(jax.random.categorical)(key_B, values_BNK)
    return jnp.take_along_axis(ids_BNK, pick_BN[..., None], axis=-1)[..., 0]
