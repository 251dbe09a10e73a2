"""The cache of keys and values: its shapes and shardings, how it is made and grows, and which
tokens its rows hold.

    cache = KVCache(layout, batch=2, context=4096)
    arrays = cache.reserve(cache.longest + 16)      # the arrays, with places for 16 more tokens
    arrays = ...                                    # the model writes keys and values
    cache.commit(arrays, [16, 9])                   # rows have grown by so many tokens
    cache.rewind(0, 2)                              # row 0 keeps only its first two tokens
    cache.release(1)                                # row 1 is free for another text

A row is one sequence, and place m of a row holds position m. The model writes the new entries
itself, in place, in the middle of each layer (models/attention.py); everything else is here.
`reserve` is the one place that decides about room. It makes the cache larger and refuses nothing; a
server with more requests than rows, or than memory, would choose there which row to release first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_jax.models.batch import LayerCache
from moe_jax.models.layer_pattern import LayerKind, layer_kinds, stack_layers
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.ops.attention.cached import place_dim
from moe_jax.parallel.half_bits import held_type
from moe_jax.parallel.sharding import named

Cache = list[list[LayerCache]]  # by stack, then by block of the stack's pattern

SHORTEST_CACHE = 1024  # places at first: only those in use are read, so room costs memory alone
STEP = 256  # the cache of a whole context is a multiple of it


def bucket(length: int, shortest: int) -> int:
    """The least of `shortest` x 1, 2, 4, ... that is not less: few shapes to compile."""
    return shortest << max(0, (-(-length // shortest) - 1).bit_length())


def places_for(length: int, context: int) -> int:
    """Places of a cache for `length` tokens per row: 1,024, 2,048 and so on, but no more than the
    context, in whole steps.

    More than the context only where a short row's new tokens, padded behind the longest row, would
    not fit.
    """

    def whole_steps(tokens: int) -> int:
        return -(-tokens // STEP) * STEP

    return max(min(bucket(length, SHORTEST_CACHE), whole_steps(context)), whole_steps(length))


class BlockCounts(NamedTuple):
    """Blocks of a cache whose rows share them."""

    full: int  # of layers without a window
    window: int  # and with one


class CacheLayout:
    """Shapes and shardings of a model's cache on a mesh: of rows of so many places, or of
    `BlockCounts` of blocks.
    """

    def __init__(self, plan: ServingPlan):
        self.plan = plan
        self._pattern = stack_layers(layer_kinds(plan.model, plan.moe))

    def zeros(self, batch: int | BlockCounts, length: int, parts: int = 1) -> Cache:
        """Zeros for `batch` rows or blocks of `length` places, of one of `parts` of the key
        heads.
        """
        model, dtype = self.plan.model, held_type(self.plan.dtype, self.plan.mesh)

        def layer(kind: LayerKind, repeats: int) -> LayerCache:
            rows = batch
            if isinstance(rows, BlockCounts):
                rows = rows.full if kind.window is None else rows.window
            if model.latent.kv_rank:
                width = model.latent.kv_rank + model.latent.rope_width
                return LayerCache(keys((repeats, rows, 1), width), None)
            shape = (repeats, rows, self.plan.cache_heads // parts)
            values = jnp.zeros((*shape, length, model.head_width), dtype)
            return LayerCache(keys(shape, model.head_width), values)

        def keys(shape: tuple[int, ...], width: int) -> jax.Array:
            dims = (width, length) if place_dim() == 4 else (length, width)
            return jnp.zeros((*shape, *dims), dtype)

        return [[layer(kind, repeats) for kind in kinds] for kinds, repeats in self._pattern]

    @cached_property
    def specs(self) -> Cache:
        """PartitionSpecs: rows over `data`, heads where attention's heads are."""
        spec: Any = P(None, "data", self.plan.kv_axes or None, None, None)
        layer = LayerCache(spec, None if self.plan.model.latent.kv_rank else spec)
        return [[layer for _ in kinds] for kinds, _ in self._pattern]

    def abstract(self, batch: int | BlockCounts, length: int) -> Any:
        """Shapes, dtypes and shardings of `new`."""
        return jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            jax.eval_shape(lambda: self.zeros(batch, length)),
            named(self.plan.mesh, self.specs),
        )

    def new(self, batch: int | BlockCounts, length: int) -> Cache:
        """An empty cache for `batch` rows (a multiple of the `data` axis) or blocks of `length`
        places.
        """
        return jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), self.abstract(batch, length)
        )

    def grow(self, cache: Cache, length: int) -> Cache:
        """The same cache with `length` places per row."""

        def pad(a: jax.Array, dim: int) -> jax.Array:
            widths = [(0, length - size if d == dim else 0) for d, size in enumerate(a.shape)]
            return jax.jit(partial(jnp.pad, pad_width=widths), out_shardings=a.sharding)(a)

        def grow_layer(layer: LayerCache) -> LayerCache:
            values = None if layer.values is None else pad(layer.values, 3)
            return LayerCache(pad(layer.keys, place_dim()), values)

        return [[grow_layer(layer) for layer in stack] for stack in cache]


class KVCache:
    """Rows of tokens whose keys and values are kept. It is made when it is first needed."""

    def __init__(self, layout: CacheLayout, batch: int, context: int):
        data = layout.plan.mesh.shape["data"]
        self.rows = -(-batch // data) * data
        """Rows of the arrays: the mesh cuts them evenly, and those beyond `batch` are padding."""
        self.most = places_for(context, context)
        """Places per row of a cache for the whole context."""
        self.lengths = [0] * batch
        """Tokens that each row holds."""
        self._layout, self._context = layout, context
        self._arrays: Cache | None = None
        self._places = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row; 0 where no row holds any."""
        return max(self.lengths)

    def reserve(self, length: int) -> Cache:
        """The arrays, with at least `length` places per row. A program that is given them may use
        their memory for those that `commit` takes.
        """
        if self._arrays is None or length > self._places:
            self._places = places_for(length, self._context)
            self._arrays = (
                self._layout.new(self.rows, self._places)
                if self._arrays is None
                else self._layout.grow(self._arrays, self._places)
            )
        return self._arrays

    def commit(self, arrays: Cache, counts: Sequence[int]) -> None:
        """Takes the arrays with `counts` more tokens in each row."""
        self._arrays = arrays
        self.lengths = [have + more for have, more in zip(self.lengths, counts, strict=True)]

    def rewind(self, row: int, length: int) -> None:
        """Forgets a row's tokens from number `length` on."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(
                f"row {row} has {self.lengths[row]} tokens and cannot be rewound to {length}"
            )
        # What lies beyond is overwritten before a query can see it.
        self.lengths[row] = length

    def release(self, row: int) -> None:
        """Forgets all of a row's tokens: it is free for another text."""
        self.rewind(row, 0)
