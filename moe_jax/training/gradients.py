"""Gradients of experts that live in several slots: summed over replicas, and the norm that counts
each once.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.models.paths import path_of
from moe_jax.moe.slots import Layers, expert_banks
from moe_jax.ops.loops import map_over
from moe_jax.parallel.collectives import AXES, pmin, psum, rank, vary, vma
from moe_jax.placement.table import EMPTY
from moe_jax.utils.annotations import Array, Float, Int


def sum_replicas(grads: Any, expert_LP: Int[Array, "L P"], num_experts: int, layers: Layers) -> Any:
    """Gradients with the sum over an expert's replicas in each of them; inside `shard_map`, with
    this rank's columns of the table.

    A layer of P slots has at most P - E replicated experts: as many rows, and not the bank, are
    summed over the `expert` axis. The sum is the same array on every rank, so replicas that were
    equal stay so bit for bit.
    """
    extra = min(expert_LP.shape[1] * lax.axis_size("expert") - num_experts, num_experts)
    if extra == 0:
        return grads
    held_LPE = expert_LP[:, :, None] == jnp.arange(num_experts)
    replicas_LE = psum(jnp.sum(held_LPE, axis=1), "expert")
    summed_LX = jnp.argsort(replicas_LE <= 1, axis=1, stable=True)[
        :, :extra
    ]  # the replicated experts, then any others
    mine_LPX = (
        jnp.take_along_axis(held_LPE, summed_LX[:, None], axis=2)
        & (jnp.take_along_axis(replicas_LE, summed_LX, axis=1) > 1)[:, None]
    )
    slot_LX, here_LX = jnp.argmax(mine_LPX, axis=1), jnp.any(mine_LPX, axis=1)
    for experts, rows in expert_banks(grads, layers):
        for name, g in experts.items():
            experts[name] = lax.fori_loop(
                0,
                len(rows),
                partial(_sum_layer, slot_LX[rows], here_LX[rows]),
                vary(g, ("expert",)),
            )
    return grads


def _sum_layer(
    slot_RX: jax.Array, here_RX: jax.Array, repeat: jax.Array, g: jax.Array
) -> jax.Array:
    """One layer's rows [X, ...] of this rank, or zeros where it holds none, summed over ranks and
    put back.
    """
    slot_X, here_X = slot_RX[repeat], here_RX[repeat]
    here = here_X.reshape(-1, *(1,) * (g.ndim - 2))
    total_X = psum(jnp.where(here, g[repeat, slot_X], 0.0), "expert")

    def put(x: jax.Array, g: jax.Array) -> jax.Array:
        row = jnp.where(here_X[x], total_X[x], g[repeat, slot_X[x]])
        return lax.dynamic_update_slice(
            g, row[None, None], (repeat, slot_X[x], *(0,) * (g.ndim - 2))
        )

    return lax.fori_loop(0, slot_X.shape[0], put, g)


def norm(
    grads: Any, expert_LP: Int[Array, "L P"], num_experts: int, layers: Layers
) -> Float[Array, ""]:
    """Global norm of sharded gradients, each expert counted once; inside `shard_map`, with this
    rank's columns of the table.

    Squares of experts are added in logical order, so that the norm does not change, not even by
    rounding, when they move.
    """
    first_LP = _first_replicas(expert_LP, num_experts)
    squares_of: dict[frozenset[str], list[jax.Array]] = defaultdict(list)  # by axes to sum over
    for experts, rows in expert_banks(grads, layers):
        for g in experts.values():
            squares = jnp.where(first_LP[rows], _square_sums(g, 2), 0.0)
            held = expert_LP[rows][..., None] == jnp.arange(num_experts)
            by_expert = jnp.sum(jnp.where(held, squares[..., None], 0.0), axis=1)
            squares_of[frozenset()].append(jnp.sum(_psum(by_expert, vma(by_expert))))
    for path, g in jax.tree.leaves_with_path(grads):
        if not path_of(path).is_expert:
            squares_of[vma(g)].append(jnp.sum(_square_sums(g, 1)))
    whole = [_psum(reduce(add, squares), axes) for axes, squares in squares_of.items()]
    return jnp.sqrt(reduce(add, whole))


def _psum(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The sum over mesh axes, in the mesh's order."""
    return psum(x, tuple(axis for axis in AXES if axis in axes)) if axes else x


def _first_replicas(expert_LP: jax.Array, num_experts: int) -> jax.Array:
    """Which of this rank's slots are the first of their expert; a rank holds an expert at most
    once. Bool [L, P/R].
    """
    held_LE = jnp.any(expert_LP[:, :, None] == jnp.arange(num_experts), axis=1)
    place = rank("expert")
    first_LE = pmin(jnp.where(held_LE, place, lax.axis_size("expert")), "expert")
    return (expert_LP != EMPTY) & (
        jnp.take_along_axis(first_LE, jnp.maximum(expert_LP, 0), axis=1) == place
    )


def _square_sums(g: jax.Array, dims: int) -> jax.Array:
    """Sums of squares over all but the first `dims` dims (and at least the last), [...], computed
    one row at a time.

    XLA:CPU writes the squares of a large array out before it sums them; those of a row stay in the
    cache.
    """
    dims = min(dims, g.ndim - 1)
    rows = g.reshape(-1, *g.shape[dims:])
    return map_over(lambda row: jnp.sum(row * row), rows).reshape(g.shape[:dims])
