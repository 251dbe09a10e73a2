"""Attention in two kinds: grouped-query and latent. Both run inside the model's `shard_map`.

Attention has three entries. Calling it reads whole packed sequences, as training does. `prefill`
reads the first tokens of sequences and writes their keys and values to a cache. `decode` reads new
tokens of sequences whose earlier keys and values are in the cache. The cache of a stack of layers
is one array that all of them share and update in place; place m holds position m.

Writing to the cache is done here and not in `inference/kv_cache.py`, which owns everything else of
it: the model writes in the middle of a layer, and models do not import inference.
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
from moe_jax.ops.attention.cached import cached_attention, place_dim
from moe_jax.ops.linear import join, project
from moe_jax.parallel.collectives import psum, rank, vary, vma
from moe_jax.parallel.half_bits import converted
from moe_jax.parallel.sharding import axes_of, bias, gather, param
from moe_jax.runtime.platform import default_platform
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

    def prefill(
        self, x_BSD: Float[Array, "B S D"], new: NewTokens, cache: LayerCache, layer: jax.Array
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """The first tokens of all rows, which look at each other alone."""
        assert cache.values is not None
        q_BSHQ, k_BSGQ, v_BSGQ = self._heads(x_BSD, new.positions, _longest(new))
        cache = LayerCache(
            _write_first(cache.keys, _as_cached(k_BSGQ), layer),
            _write_first(cache.values, jnp.swapaxes(v_BSGQ, 1, 2), layer),
        )
        segments_BS = new.valid.astype(jnp.int32)
        out_BSHQ = attention(
            q_BSHQ, k_BSGQ, v_BSGQ, segments_BS, impl=self.config.attention, **self._options()
        )
        return self._out(out_BSHQ), cache

    def decode(
        self, x_BSD: Float[Array, "B S D"], new: NewTokens, cache: LayerCache, layer: jax.Array
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """New tokens of rows whose earlier keys and values the cache holds."""
        assert cache.values is not None
        table_BT = _table(new, self.window)
        q_BSHQ, k_BSGQ, v_BSGQ = self._heads(x_BSD, new.positions, _longest(new))
        cache = LayerCache(
            _write_behind(cache.keys, _as_cached(k_BSGQ), place_dim(), layer, new, table_BT),
            _write_behind(cache.values, jnp.swapaxes(v_BSGQ, 1, 2), 3, layer, new, table_BT),
        )
        out_BSHQ = cached_attention(
            q_BSHQ,
            cache.keys,
            cache.values,
            layer,
            new.positions,
            table_BT=table_BT,
            **self._options(),
        )
        return self._out(out_BSHQ), cache

    def _options(self) -> dict[str, Any]:
        sinks = gather(self.sinks) if self.config.sinks else None
        return {"window": self.window, "scale": self.config.attention_scale, "sinks_H": sinks}

    def _heads(
        self, x_BSD: jax.Array, positions_BS: jax.Array, length: int | jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, normalised, clipped and rotated."""
        config, dtype = self.config, x_BSD.dtype
        q_BSHQ = project(x_BSD, gather(self.query, dtype))
        k_BSGQ = project(x_BSD, self._own_heads(self.key, dtype))
        v_BSGQ = project(x_BSD, self._own_heads(self.value, dtype))
        if config.qkv_bias:
            q_BSHQ = _add(q_BSHQ, self.query_bias)
            k_BSGQ = k_BSGQ + self._own_heads(self.key_bias, dtype)
            v_BSGQ = v_BSGQ + self._own_heads(self.value_bias, dtype)
        if config.qk_norm:
            q_BSHQ, k_BSGQ = self.query_norm(q_BSHQ), self.key_norm(k_BSGQ)
        if config.clip_qkv is not None:
            limit = config.clip_qkv
            q_BSHQ, k_BSGQ, v_BSGQ = (jnp.clip(x, -limit, limit) for x in (q_BSHQ, k_BSGQ, v_BSGQ))
        frequency, scale = frequencies(config.rope, config.head_width, length)
        q_BSHQ, k_BSGQ = (rotate(x, positions_BS, frequency, scale) for x in (q_BSHQ, k_BSGQ))
        return q_BSHQ, k_BSGQ, v_BSGQ

    def _own_heads(self, parameter: nnx.Param, dtype: Any) -> Any:
        """A parameter of keys or values, of the heads that this device's query heads look at: where
        devices share key heads, each uses one of those that it holds.
        """
        held, kv_axes = gather(parameter, dtype), axes_of(parameter, "kv_heads")
        sharing = tuple(axis for axis in axes_of(self.query, "heads") if axis not in kv_axes)
        if not sharing:
            return held
        own = rank(sharing) * jax.tree.leaves(held)[0].shape[0] // lax.axis_size(sharing)
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, own, 1), held)

    def _out(self, out_BSHQ: jax.Array) -> jax.Array:
        return _project_out(out_BSHQ, self.out, self.out_bias if self.config.out_bias else None)


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads come from one
    vector per token.

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

    def prefill(
        self, x_BSD: Float[Array, "B S D"], new: NewTokens, cache: LayerCache, layer: jax.Array
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """As `Attention.prefill`; the cache holds the normalised latent and the rotated key,
        [repeats, B, 1, kv_rank + rope_width, M], or its last two dims swapped (`place_dim`).
        """
        q_BSHQ, c_BS1C = self._latents(x_BSD, new.positions, _longest(new))
        cache = LayerCache(_write_first(cache.keys, _as_cached(c_BS1C), layer), None)
        return self._out(self._expanded(q_BSHQ, c_BS1C, new.valid.astype(jnp.int32))), cache

    def decode(
        self, x_BSD: Float[Array, "B S D"], new: NewTokens, cache: LayerCache, layer: jax.Array
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """As `Attention.decode`, over the cache that `prefill` describes."""
        q_BSHQ, c_BS1C = self._latents(x_BSD, new.positions, _longest(new))
        entries, table_BT = _as_cached(c_BS1C), _table(new, self.window)
        keys = _write_behind(cache.keys, entries, place_dim(), layer, new, table_BT)
        cache = LayerCache(keys, None)
        head, rank = self.config.head_width, self.config.latent.kv_rank
        up_CHN = gather(self.kv_up, x_BSD.dtype)
        q_BSHC = jnp.einsum("bshn,chn->bshc", q_BSHQ[..., :head], up_CHN[..., :head])
        q_BSHC = jnp.concatenate([q_BSHC, q_BSHQ[..., head:]], axis=-1)
        options: dict[str, Any] = {
            "table_BT": table_BT,
            "value_width": rank,
            "window": self.window,
            "scale": self._scale(),
        }
        out_BSHC = cached_attention(q_BSHC, cache.keys, None, layer, new.positions, **options)
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
            low_BSX = project(x_BSD, gather(self.query_down, dtype))
            if config.qkv_bias:
                low_BSX = _add(low_BSX, self.query_down_bias)
            q_BSHQ = project(self.query_norm(low_BSX), gather(self.query_up, dtype))
        c_BSC = project(x_BSD, gather(self.kv_down, dtype))
        if config.qkv_bias:
            c_BSC = _add(c_BSC, self.kv_down_bias)
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
        return _project_out(out_BSHU, self.out, self.out_bias if self.config.out_bias else None)


def _add(x: jax.Array, bias: nnx.Param) -> jax.Array:
    """`x` with a bias, in x's dtype."""
    return x + gather(bias, x.dtype)


def _project_out(out_BSHU: jax.Array, out: nnx.Param, bias: nnx.Param | None) -> jax.Array:
    """Heads' outputs [B, S, H, U] through the output projection: [B, S, D], the same on all devices
    that hold heads.
    """
    y_BSD = psum(join(out_BSHU, gather(out, out_BSHU.dtype), 2), axes_of(out, "heads"))
    return y_BSD if bias is None else _add(y_BSD, bias)


def _longest(new: NewTokens) -> jax.Array:
    """Positions in use by the longest row."""
    return jnp.max(new.start + new.length)


def _as_cached(k_BSGQ: jax.Array) -> jax.Array:
    """Keys in the cache's order of dims, [B, G, Q, S] or [B, G, S, Q]."""
    return jnp.moveaxis(k_BSGQ, 1, place_dim() - 1)


def _write_first(cache: jax.Array, new: jax.Array, layer: jax.Array) -> jax.Array:
    """The cache [repeats, B, ...] with new entries [B, ...] of a layer in the first places of each
    row.
    """
    zero = jnp.int32(0)
    start = (layer, *(zero for _ in range(1, cache.ndim)))
    return lax.dynamic_update_slice(
        cache, converted(new, cache.dtype)[None], start, allow_negative_indices=False
    )


def _table(new: NewTokens, window: int | None) -> jax.Array | None:
    """Where rows have their places in a layer with this window; None where they are their own."""
    return None if new.blocks is None else new.blocks.of(window)


def _write_behind(
    cache: jax.Array,
    entries: jax.Array,
    dim: int,
    layer: jax.Array,
    new: NewTokens,
    table_BT: jax.Array | None,
) -> jax.Array:
    """The cache [repeats, N, ...] with entries [B, ...] of a layer in the places from each row's
    start on; `dim` is the cache's dim of places. In a cache of blocks, rows without new tokens
    write to block 0.
    """
    entries, zero = converted(entries, cache.dtype), jnp.int32(0)
    rows, width = entries.shape[0], entries.shape[dim - 1]
    whole = cache.shape[dim]
    size = width if table_BT is None else min(width, whole)
    pieces = width // size

    def write(i: jax.Array, cache: jax.Array) -> jax.Array:
        row, first = (i, zero) if pieces == 1 else (i // pieces, i % pieces * size)
        piece = lax.dynamic_slice_in_dim(entries, row, 1, allow_negative_indices=False)
        place, number = new.start[row] + first, row
        if table_BT is not None:
            number = jnp.where(new.length[row] > 0, table_BT[row, place // whole], 0)
            place %= whole
            piece = lax.dynamic_slice_in_dim(
                piece, first, size, dim - 1, allow_negative_indices=False
            )
        at = (layer, number, *(place if d == dim else zero for d in range(2, cache.ndim)))
        return lax.dynamic_update_slice(cache, piece[None], at, allow_negative_indices=False)

    if rows * pieces == 1:
        return write(zero, cache)
    # Written out where a loop inside that over layers waits for the host.
    unroll = not default_platform().open_loops
    return lax.fori_loop(0, rows * pieces, write, cache, unroll=unroll)
