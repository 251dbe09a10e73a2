"""Attention block by block, in XLA alone, with a hand-written backward pass.

Queries and keys are cut into blocks of equal length. A scan walks the blocks of queries, and in it
a loop those blocks of keys that the queries may see, with a running softmax (Milakov and
Gimelshein, 2018). The program has one block's code however many blocks there are, except where
such a loop is slow (`Platform.open_loops`): there both are unrolled.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.attention.reference import MASKED
from moe_jax.ops.products import einsum_f32
from moe_jax.parallel.collectives import vary, vma
from moe_jax.runtime.platform import default_platform

MIN_BLOCK, MAX_BLOCK = 128, 512  # tokens
BLOCKS = 8  # of a sequence, where the bounds allow


class _Cut(NamedTuple):
    """How sequences are cut into N blocks of C tokens, the last one padded."""

    length: int
    groups: int  # G
    window: int | None
    scale: float

    @property
    def block(self) -> int:
        """Tokens C of a block."""
        most = min(max(MIN_BLOCK, -(-self.length // BLOCKS)), MAX_BLOCK)
        return -(-self.length // -(-self.length // most))

    def split(self, x_BSHQ: jax.Array) -> jax.Array:
        """Blocks whose rows are the tokens of each head that reads the same key head,
        [N, B, G, H/G * C, Q].
        """
        batch, length, _, width = x_BSHQ.shape
        x = jnp.pad(x_BSHQ, ((0, 0), (0, -length % self.block), (0, 0), (0, 0)))
        x = x.reshape(batch, -1, self.block, self.groups, x.shape[2] // self.groups, width)
        x = x.transpose(1, 0, 3, 4, 2, 5)
        return x.reshape(*x.shape[:3], -1, width)

    def join(self, x_NBGRQ: jax.Array) -> jax.Array:
        """What `split` cut, [B, S, H, Q]."""
        blocks, batch, _, _, width = x_NBGRQ.shape
        x = x_NBGRQ.reshape(blocks, batch, self.groups, -1, self.block, width)
        x = x.transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(batch, blocks * self.block, -1, width)[:, : self.length]

    def split_segments(self, segments_BS: jax.Array) -> jax.Array:
        """The segments of each block, [N, B, C]."""
        padded = jnp.pad(segments_BS, ((0, 0), (0, -self.length % self.block)))
        return jnp.swapaxes(padded.reshape(padded.shape[0], -1, self.block), 0, 1)

    def rows(self, sinks_H: jax.Array, batch: int) -> jax.Array:
        """A value per head for each row of a block, [B, G, R]."""
        sinks = jnp.repeat(sinks_H.reshape(self.groups, -1), self.block, axis=1)
        return jnp.broadcast_to(sinks, (batch, *sinks.shape))

    def over_keys(self, i: Any, step: Any, carry: Any) -> Any:
        """`step(j, carry)` for each block j of keys that a query of block i may see."""
        start = 0 if self.window is None else i * self.block - self.window + 1
        if default_platform().open_loops:
            return lax.fori_loop(jnp.maximum(start, 0) // self.block, i + 1, step, carry)
        for j in range(max(start, 0) // self.block, i + 1):
            carry = step(j, carry)
        return carry

    def scores(
        self, q: jax.Array, k: jax.Array, segments_NBC: jax.Array, i: Any, j: Any
    ) -> jax.Array:
        """Masked scaled scores f32 [B, G, R, C] of queries [B, G, R, Q] of block i and keys [B, G,
        C, Q] of block j.
        """
        scores = einsum_f32("bgrd,bgcd->bgrc", q, k) * self.scale
        place = jnp.arange(self.block)
        back = (i - j) * self.block + place[:, None] - place
        near = (back >= 0) if self.window is None else (back >= 0) & (back < self.window)
        queries, keys = _at(segments_NBC, i)[:, :, None], _at(segments_NBC, j)[:, None]
        visible = (near & (queries == keys))[:, None, None]
        by_head = scores.reshape(*scores.shape[:2], -1, self.block, self.block)
        return jnp.where(visible, by_head, MASKED).reshape(scores.shape)


_at = partial(lax.dynamic_index_in_dim, keepdims=False)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def blockwise_attention(
    q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, window: int | None, scale: float
) -> jax.Array:
    """`attention` with sinks f32 [H]; one block of scores is in memory at a time."""
    return _blockwise_fwd(q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, window, scale)[0]


def _blockwise_fwd(q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, window: int | None, scale: float):
    cut = _Cut(q_BSHQ.shape[1], k_BSGQ.shape[2], window, scale)
    q_N, k_N, v_N = cut.split(q_BSHQ), cut.split(k_BSGQ), cut.split(v_BSGU)
    segments_NBC = cut.split_segments(segments_BS)
    sinks = cut.rows(sinks_H, q_BSHQ.shape[0])
    nothing = vary(jnp.zeros((*q_N.shape[1:4], v_N.shape[-1]), jnp.float32), vma(q_BSHQ))

    def queries(_: None, block: tuple[Any, jax.Array]):
        i, q = block

        def keys(j: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, out = carry
            scores = cut.scores(q, _at(k_N, j), segments_NBC, i, j)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights, fade = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            part = einsum_f32("bgrc,bgcu->bgru", weights.astype(v_N.dtype), _at(v_N, j))
            total = total * fade + jnp.sum(weights, axis=-1)
            return higher, total, out * fade[..., None] + part

        # A sink is a key that has been read before all others.
        carry = (sinks, jnp.ones_like(sinks), nothing)
        top, total, out = cut.over_keys(i, keys, carry)
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    _, (out_N, logsum_N) = _over_queries(queries, None, (q_N,))
    out_BSHU = cut.join(out_N)
    return out_BSHU, (q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, out_BSHU, logsum_N)


def _blockwise_bwd(window: int | None, scale: float, saved, dout_BSHU: jax.Array):
    q_BSHQ, k_BSGQ, v_BSGU, sinks_H, segments_BS, out_BSHU, logsum_N = saved
    cut = _Cut(q_BSHQ.shape[1], k_BSGQ.shape[2], window, scale)
    q_N, k_N, v_N, dout_N = map(cut.split, (q_BSHQ, k_BSGQ, v_BSGU, dout_BSHU))
    segments_NBC = cut.split_segments(segments_BS)
    # sum_k p * dp, the term that the softmax's normalisation subtracts, is out . dout for each
    # query.
    inner_N = einsum_f32("nbgru,nbgru->nbgr", cut.split(out_BSHU), dout_N)
    no_dq, *no_dkv = vary(
        tuple(jnp.zeros(s, jnp.float32) for s in (q_N.shape[1:], k_N.shape, v_N.shape)),
        vma(q_BSHQ),
    )

    def queries(dkv: tuple[jax.Array, jax.Array], block: tuple[Any, ...]):
        i, q, dout, inner, logsum = block

        def keys(j: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk_N, dv_N = carry
            k, v = _at(k_N, j), _at(v_N, j)
            weights = jnp.exp(cut.scores(q, k, segments_NBC, i, j) - logsum[..., None])
            dweights = einsum_f32("bgru,bgcu->bgrc", dout, v)
            dscores = (weights * (dweights - inner[..., None]) * scale).astype(q.dtype)
            dq = dq + einsum_f32("bgrc,bgcd->bgrd", dscores, k)
            dk_N = _add_at(dk_N, einsum_f32("bgrc,bgrd->bgcd", dscores, q), j)
            dv_N = _add_at(dv_N, einsum_f32("bgrc,bgru->bgcu", weights.astype(q.dtype), dout), j)
            return dq, dk_N, dv_N

        dq, *dkv = cut.over_keys(i, keys, (no_dq, *dkv))
        return tuple(dkv), dq.astype(q.dtype)

    blocks = (q_N, dout_N, inner_N, logsum_N)
    (dk_N, dv_N), dq_N = _over_queries(queries, tuple(no_dkv), blocks)
    dk, dv = dk_N.astype(k_BSGQ.dtype), dv_N.astype(v_BSGU.dtype)
    # A sink's value is zero, so only the normalisation's term is left of its gradient.
    dsinks_N = jnp.exp(cut.rows(sinks_H, q_BSHQ.shape[0]) - logsum_N) * inner_N
    dsinks_H = -jnp.sum(dsinks_N.reshape(-1, sinks_H.shape[0], cut.block), axis=(0, 2))
    return cut.join(dq_N), cut.join(dk), cut.join(dv), dsinks_H, None


def _over_queries(step: Any, carry: Any, blocks: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """`lax.scan` of `step(carry, (i, *block i))`."""
    count = blocks[0].shape[0]
    if default_platform().open_loops:
        return lax.scan(step, carry, (jnp.arange(count), *blocks))
    results = []
    for i in range(count):
        carry, result = step(carry, (i, *(block[i] for block in blocks)))
        results.append(result)
    return carry, jax.tree.map(lambda *a: jnp.stack(a), *results)


def _add_at(total_N: jax.Array, part: jax.Array, j: Any) -> jax.Array:
    """The blocks with a part added to block j."""
    return lax.dynamic_update_index_in_dim(total_N, _at(total_N, j) + part, j, 0)


blockwise_attention.defvjp(_blockwise_fwd, _blockwise_bwd)
