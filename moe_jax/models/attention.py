"""The dense parts of a layer: norm, attention in two kinds, feed-forward. They run inside the
model's `shard_map`.

Attention has two entries: calling it reads whole packed sequences, as training does; `extend` reads
new tokens of sequences whose earlier keys and values are in a cache. The cache of a stack of layers
is one array that all of them share and update in place; place m holds position m.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.config.model import ModelConfig
from moe_jax.models.batch import Batch, LayerCache, NewTokens
from moe_jax.models.norm import RMSNorm
from moe_jax.models.rope import frequencies, rotate
from moe_jax.ops.attention.api import attention
from moe_jax.ops.attention.cached import cached_attention
from moe_jax.ops.linear import join, project
from moe_jax.parallel.collectives import psum, vary, vma
from moe_jax.parallel.sharding import axes_of, bias, gather, param
from moe_jax.utils.annotations import Array, Float

# of latent attention's own norms, whatever the model's is: so in DeepSeek's code and in
# transformers
LATENT_EPS = 1e-6


class Attention(nnx.Module):
    """Grouped-query attention; heads are sharded over `tensor`, and the output is summed over
    it.
    """

    def __init__(self, config: ModelConfig, window: int | None, out_std: float, *, rngs: nnx.Rngs):
        self.config, self.window = config, window
        width, heads, groups, head = (
            config.width,
            config.num_heads,
            config.num_kv_heads,
            config.head_width,
        )
        self.query = param(rngs, (width, heads, head), ("width", "heads", "head"), width**-0.5)
        self.key = param(rngs, (width, groups, head), ("width", "kv_heads", "head"), width**-0.5)
        self.value = param(rngs, (width, groups, head), ("width", "kv_heads", "head"), width**-0.5)
        self.out = param(rngs, (width, heads, head), ("width", "heads", "head"), out_std)
        if config.qkv_bias:
            self.query_bias = bias((heads, head), ("heads", "head"))
            self.key_bias, self.value_bias = (
                bias((groups, head), ("kv_heads", "head")) for _ in range(2)
            )
        if config.out_bias:
            self.out_bias = bias((width,), ("norm",))
        if config.sinks:
            self.sinks = bias((heads,), ("heads",))
        if config.qk_norm and config.qk_norm_over == "head":
            self.query_norm, self.key_norm = (
                RMSNorm((head,), config.norm_eps, rngs=rngs) for _ in range(2)
            )
        elif config.qk_norm:
            self.query_norm = RMSNorm(
                (heads, head), config.norm_eps, axes=("heads", "norm"), rngs=rngs
            )
            self.key_norm = RMSNorm(
                (groups, head), config.norm_eps, axes=("kv_heads", "norm"), rngs=rngs
            )

    def __call__(self, x_BSD: Float[Array, "B S D"], batch: Batch) -> Float[Array, "B S D"]:
        q_BSHQ, k_BSGQ, v_BSGQ = self._heads(x_BSD, batch.positions, x_BSD.shape[1])
        return self._out(
            attention(
                q_BSHQ,
                k_BSGQ,
                v_BSGQ,
                batch.segments,
                impl=self.config.attention,
                **self._options(),
            )
        )

    def extend(
        self,
        x_BSD: Float[Array, "B S D"],
        turn: NewTokens,
        cache: LayerCache,
        layer: jax.Array,
        *,
        fresh: bool,
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """`fresh` promises that the cache holds nothing for these rows, so that only the new tokens
        need be read.
        """
        assert cache.values is not None
        q_BSHQ, k_BSGQ, v_BSGQ = self._heads(x_BSD, turn.positions, _longest(turn))
        cache = LayerCache(
            _store(cache.keys, jnp.moveaxis(k_BSGQ, 1, 3), 4, layer, turn, fresh),
            _store(cache.values, jnp.swapaxes(v_BSGQ, 1, 2), 3, layer, turn, fresh),
        )
        if fresh:
            segments_BS = turn.valid.astype(jnp.int32)
            out_BSHQ = attention(
                q_BSHQ, k_BSGQ, v_BSGQ, segments_BS, impl=self.config.attention, **self._options()
            )
        else:
            out_BSHQ = cached_attention(
                q_BSHQ, cache.keys, cache.values, layer, turn.positions, **self._options()
            )
        return self._out(out_BSHQ), cache

    def _options(self) -> dict[str, Any]:
        sinks = gather(self.sinks) if self.config.sinks else None
        return {"window": self.window, "scale": self.config.attention_scale, "sinks_H": sinks}

    def _heads(
        self, x_BSD: jax.Array, positions_BS: jax.Array, length: int | jax.Array
    ) -> tuple[jax.Array, ...]:
        """Queries, keys and values, normalised and rotated."""
        config, found = self.config, []
        for name in ("query", "key", "value"):
            head = project(x_BSD, gather(getattr(self, name), x_BSD.dtype))
            head = (
                head + gather(getattr(self, f"{name}_bias"), x_BSD.dtype)
                if config.qkv_bias
                else head
            )
            head = (
                getattr(self, f"{name}_norm")(head) if config.qk_norm and name != "value" else head
            )
            found.append(
                head
                if config.clip_qkv is None
                else jnp.clip(head, -config.clip_qkv, config.clip_qkv)
            )
        frequency, scale = frequencies(config.rope, config.head_width, length)
        q_BSHQ, k_BSGQ = (rotate(x, positions_BS, frequency, scale) for x in found[:2])
        return q_BSHQ, k_BSGQ, found[2]

    def _out(self, out_BSHQ: jax.Array) -> jax.Array:
        y_BSD = psum(
            join(out_BSHQ, gather(self.out, out_BSHQ.dtype), 2), axes_of(self.out, "heads")
        )
        return y_BSD + gather(self.out_bias, y_BSD.dtype) if self.config.out_bias else y_BSD


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads come from one
    vector a token.

    Only that vector and one rotated key are cached. Over a cache it is grouped-query attention with
    one group: the keys' projection moves to the queries and the values' to the output.
    """

    def __init__(self, config: ModelConfig, window: int | None, out_std: float, *, rngs: nnx.Rngs):
        self.config, self.window = config, window
        latent, width, heads, head = (
            config.latent,
            config.width,
            config.num_heads,
            config.query_width,
        )
        if latent.q_rank is None:
            self.query = param(rngs, (width, heads, head), ("width", "heads", "head"), width**-0.5)
        else:
            self.query_down = param(rngs, (width, latent.q_rank), ("width", "latent"), width**-0.5)
            self.query_norm = RMSNorm((latent.q_rank,), LATENT_EPS, rngs=rngs)
            self.query_up = param(
                rngs, (latent.q_rank, heads, head), ("width", "heads", "head"), latent.q_rank**-0.5
            )
        self.kv_down = param(
            rngs, (width, latent.kv_rank + latent.rope_width), ("width", "latent"), width**-0.5
        )
        self.kv_norm = RMSNorm((latent.kv_rank,), LATENT_EPS, rngs=rngs)
        up = (latent.kv_rank, heads, config.head_width + latent.value_width)
        self.kv_up = param(rngs, up, ("width", "heads", "head"), latent.kv_rank**-0.5)
        self.out = param(
            rngs, (width, heads, latent.value_width), ("width", "heads", "head"), out_std
        )
        if config.qkv_bias:
            self.kv_down_bias = bias((latent.kv_rank + latent.rope_width,), ("norm",))
            if latent.q_rank is not None:
                self.query_down_bias = bias((latent.q_rank,), ("norm",))
        if config.out_bias:
            self.out_bias = bias((width,), ("norm",))

    def __call__(self, x_BSD: Float[Array, "B S D"], batch: Batch) -> Float[Array, "B S D"]:
        q_BSHQ, c_BS1C = self._latents(x_BSD, batch.positions, x_BSD.shape[1])
        return self._out(self._expanded(q_BSHQ, c_BS1C, batch.segments))

    def extend(
        self,
        x_BSD: Float[Array, "B S D"],
        turn: NewTokens,
        cache: LayerCache,
        layer: jax.Array,
        *,
        fresh: bool,
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """As `Attention.extend`; the cache holds the normalised latent and the rotated key,
        [repeats, B, 1, kv_rank + rope_width, M].
        """
        q_BSHQ, c_BS1C = self._latents(x_BSD, turn.positions, _longest(turn))
        cache = LayerCache(
            _store(cache.keys, jnp.moveaxis(c_BS1C, 1, 3), 4, layer, turn, fresh), None
        )
        if fresh:
            return self._out(self._expanded(q_BSHQ, c_BS1C, turn.valid.astype(jnp.int32))), cache
        head, rank = self.config.head_width, self.config.latent.kv_rank
        up_CHN = gather(self.kv_up, x_BSD.dtype)
        q_BSHC = jnp.einsum("bshn,chn->bshc", q_BSHQ[..., :head], up_CHN[..., :head])
        q_BSHC = jnp.concatenate([q_BSHC, q_BSHQ[..., head:]], axis=-1)
        options: dict[str, Any] = {
            "value_width": rank,
            "window": self.window,
            "scale": self._scale(),
        }
        out_BSHC = cached_attention(q_BSHC, cache.keys, None, layer, turn.positions, **options)
        return self._out(jnp.einsum("bshc,chu->bshu", out_BSHC, up_CHN[..., head:])), cache

    def _scale(self) -> float:
        return self.config.attention_scale or self.config.query_width**-0.5

    def _latents(
        self, x_BSD: jax.Array, positions_BS: jax.Array, length: int | jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Queries [B, S, H, N+R] and, for all heads, the latent beside its rotated key [B, S, 1,
        C]; rotations done.
        """
        config, dtype = self.config, x_BSD.dtype
        if config.latent.q_rank is None:
            q_BSHQ = project(x_BSD, gather(self.query, dtype))
        else:
            low = project(x_BSD, gather(self.query_down, dtype))
            low = low + gather(self.query_down_bias, dtype) if config.qkv_bias else low
            q_BSHQ = project(self.query_norm(low), gather(self.query_up, dtype))
        c_BSC = project(x_BSD, gather(self.kv_down, dtype))
        c_BSC = c_BSC + gather(self.kv_down_bias, dtype) if config.qkv_bias else c_BSC
        frequency, scale = frequencies(config.rope, config.latent.rope_width, length)
        head, rank = config.head_width, config.latent.kv_rank
        turned = rotate(q_BSHQ[..., head:], positions_BS, frequency, scale)
        key_BS1R = rotate(c_BSC[:, :, None, rank:], positions_BS, frequency, scale)
        c_BS1C = jnp.concatenate([self.kv_norm(c_BSC[..., :rank])[:, :, None], key_BS1R], axis=-1)
        return jnp.concatenate([q_BSHQ[..., :head], turned], axis=-1), c_BS1C

    def _expanded(self, q_BSHQ: jax.Array, c_BS1C: jax.Array, segments_BS: jax.Array) -> jax.Array:
        """Attention with every head's keys and values written out."""
        head, rank = self.config.head_width, self.config.latent.kv_rank
        both_BSHN = project(c_BS1C[:, :, 0, :rank], gather(self.kv_up, c_BS1C.dtype))
        rope_BSHR = jnp.broadcast_to(
            c_BS1C[..., rank:], (*both_BSHN.shape[:3], c_BS1C.shape[-1] - rank)
        )
        rope_BSHR = vary(rope_BSHR, vma(both_BSHN))
        keys = jnp.concatenate([both_BSHN[..., :head], rope_BSHR], axis=-1)
        options: dict[str, Any] = {
            "window": self.window,
            "scale": self._scale(),
            "impl": self.config.attention,
        }
        return attention(q_BSHQ, keys, both_BSHN[..., head:], segments_BS, **options)

    def _out(self, out_BSHU: jax.Array) -> jax.Array:
        y_BSD = psum(
            join(out_BSHU, gather(self.out, out_BSHU.dtype), 2), axes_of(self.out, "heads")
        )
        return y_BSD + gather(self.out_bias, y_BSD.dtype) if self.config.out_bias else y_BSD


def _longest(turn: NewTokens) -> jax.Array:
    """Positions in use by the longest row."""
    return jnp.max(turn.start + turn.length)


def _store(
    cache: jax.Array, new: jax.Array, dim: int, layer: jax.Array, turn: NewTokens, fresh: bool
) -> jax.Array:
    """The cache [repeats, B, ...] with new entries [B, ...] of a layer in the places, which are dim
    `dim`, from each row's start on.
    """
    new, zero = new.astype(cache.dtype), jnp.int32(0)

    def at(row, start):
        return (
            layer,
            row,
            *(start if d == dim else zero for d in range(2, cache.ndim)),
        )

    if fresh:
        return lax.dynamic_update_slice(cache, new[None], at(zero, zero))

    def store(row: jax.Array, cache: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(
            cache, lax.dynamic_slice_in_dim(new, row, 1)[None], at(row, turn.start[row])
        )

    return lax.fori_loop(0, new.shape[0], store, cache) if new.shape[0] > 1 else store(zero, cache)
