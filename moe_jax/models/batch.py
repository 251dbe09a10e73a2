"""What goes through a model: packed sequences in training, new tokens and a cache in inference."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.utils.annotations import Array, Float, Int, Shaped


class Batch(NamedTuple):
    """Packed sequences. `sequences` numbers them within the step's whole batch, so that noise does
    not depend on the mesh.
    """

    tokens: Int[Array, "B S"]
    targets: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]  # documents from 1; 0 is padding
    mask: Float[Array, "B S"]  # 1 where the target counts
    sequences: Int[Array, " B"]

    @property
    def counted(self) -> jax.Array:
        """How many targets count."""
        return jnp.sum(self.mask)

    def routed(self, by_sequence: bool) -> jax.Array:
        """How many tokens or, if it goes by sequence, rows are routed."""
        real = self.segments > 0
        return jnp.sum(jnp.any(real, axis=-1) if by_sequence else real)


class SeriesBatch(NamedTuple):
    """Windows of series, NaN where a value is missing; `sequences` numbers them as in `Batch`."""

    context: Float[Array, "B T"]
    target: Float[Array, "B H"]
    sequences: Int[Array, " B"]

    @property
    def counted(self) -> jax.Array:
        """How many targets count."""
        return jnp.sum(~jnp.isnan(self.target)).astype(jnp.float32)

    def routed(self, by_sequence: bool) -> jax.Array:
        """How many series are routed: all of them, and each once."""
        del by_sequence
        return jnp.sum(jnp.ones_like(self.sequences))


AnyBatch = Batch | SeriesBatch


class BlockTables(NamedTuple):
    """Where rows have their places, in a cache of blocks: block t of a row holds places t * M and
    following, M being the places of a block. Block 0 is nobody's.
    """

    full: Int[Array, "B T"]  # of layers without a window
    window: Int[Array, "B T"]  # and with one, which have blocks of their own

    def of(self, window: int | None) -> jax.Array:
        """That of a layer."""
        return self.full if window is None else self.window


class NewTokens(NamedTuple):
    """New tokens of sequences whose earlier tokens are in a cache. Rows are padded at the end.

    In a cache of blocks several new tokens of a row begin with a block, or lie in one.
    """

    tokens: Int[Array, "B S"]
    start: Int[Array, " B"]  # tokens of the row that the cache holds
    length: Int[Array, " B"]  # new tokens
    blocks: BlockTables | None = None  # of a cache of blocks; of others a row's places are its own

    @classmethod
    def whole_rows(cls, tokens_BS: Any) -> NewTokens:
        """Rows without padding that begin with these tokens."""
        rows, length = np.shape(tokens_BS)
        return cls(
            jnp.asarray(tokens_BS, jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.full(rows, length, jnp.int32),
        )

    @property
    def positions(self) -> jax.Array:
        """Position of each token, [B, S]."""
        return self.start[:, None] + jnp.arange(self.tokens.shape[1])

    @property
    def valid(self) -> jax.Array:
        """Which tokens are no padding, bool [B, S]."""
        return jnp.arange(self.tokens.shape[1]) < self.length[:, None]


class LayerCache(NamedTuple):
    """Keys and values of a stack's layers, of N rows or blocks; `values` is None where values are a
    part of the keys (latent attention).
    """

    keys: Shaped[Array, "R N G _ _"]  # Q M, or M Q: `ops.attention.cached.place_dim`
    values: Shaped[Array, "R N G M U"] | None
