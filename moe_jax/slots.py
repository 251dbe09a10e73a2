"""Parameters and gradients of experts, which live in slots: laying out, merging replicas, the norm.

In a tree of parameters the experts of block j of stack i are arrays [repeats, P, ...]; `expert_layers` says which MoE
layers, and so which rows of a table [L, P], its repeats are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.annotations import Array, Float, Int
from moe_jax.model import expert_layers
from moe_jax.placement.table import EMPTY
from moe_jax.schema import ModelConfig, MoEConfig
from moe_jax.spmd import AXES, vma

Layers = dict[tuple[int, int], list[int]]


def _experts(tree: Any, layers: Layers) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
    """The experts' arrays of each block, to be replaced in place, and the table rows of their repeats."""
    for (stack, block), rows in layers.items():
        yield tree["stacks"][stack]["blocks"][block]["mlp"]["experts"], np.array(rows)


def lay_out(params: Any, model: ModelConfig, moe: MoEConfig, table_LP: np.ndarray) -> Any:
    """Parameters with experts in logical order [repeats, E, ...], changed to slots [repeats, P, ...]; zeros where empty."""
    for experts, rows in _experts(params, expert_layers(model, moe)):
        for name, logical in experts.items():
            experts[name] = take_slots(logical, table_LP[rows])
    return params


def take_slots(weights: jax.Array, source_RP: np.ndarray) -> jax.Array:
    """Rows of the second dim by index, for each index of the first; zeros for EMPTY. [R, N, ...] to [R, P, ...]."""
    source = jnp.asarray(np.where(source_RP == EMPTY, weights.shape[1], source_RP))
    return jax.vmap(lambda w, s: w.at[s].get(mode="fill", fill_value=0))(weights, source)


def merge_replicas(grads: Any, model: ModelConfig, moe: MoEConfig, expert_LP: Int[Array, "L P"]) -> Any:
    """Gradients with those of an expert's replicas summed in each of them."""
    for experts, rows in _experts(grads, expert_layers(model, moe)):
        expert_RP = expert_LP[rows]
        same_RPP = (expert_RP[:, :, None] == expert_RP[:, None]) & (expert_RP != EMPTY)[:, :, None]
        for name, g in experts.items():
            experts[name] = jnp.einsum("lpq,lq...->lp...", same_RPP.astype(g.dtype), g, precision=lax.Precision.HIGHEST)
    return grads


def shares(expert_LP: Int[Array, "L P"]) -> Float[Array, "L P"]:
    """For each slot one over the number of its expert's replicas; 0 for an empty slot."""
    same_LPP = expert_LP[:, :, None] == expert_LP[:, None]
    return (expert_LP != EMPTY).astype(jnp.float32) / jnp.sum(same_LPP, axis=-1).astype(jnp.float32)


def norm(grads: Any, share_LP: Float[Array, "L P"] | None, layers: Layers) -> Float[Array, ""]:
    """Global norm of sharded gradients, each expert counted once; call it inside `shard_map`.

    `share_LP` holds the local columns of `shares`, or is None where every slot holds an expert of its own.
    """
    rows_of = {id(g): rows for experts, rows in _experts(grads, layers) for g in experts.values()}
    sums: dict[frozenset[str], jax.Array] = {}
    for g in jax.tree.leaves(grads):
        rows = rows_of.get(id(g))
        squares = _square_sums(g, 1 if rows is None else 2)
        total = jnp.sum(squares if rows is None or share_LP is None else squares * share_LP[rows])
        sums[vma(g)] = sums[vma(g)] + total if vma(g) in sums else total
    whole = [lax.psum(total, tuple(axis for axis in AXES if axis in axes)) if axes else total for axes, total in sums.items()]
    return jnp.sqrt(sum(whole[1:], whole[0]))


def _square_sums(g: jax.Array, dims: int) -> jax.Array:
    """Sums of squares over all but the first `dims` dims (and at least the last), [...], computed one row at a time.

    XLA:CPU writes the squares of a large array out before it sums them; those of a row stay in the cache.
    """
    dims = min(dims, g.ndim - 1)
    rows = g.reshape(-1, *g.shape[dims:])
    return lax.map(lambda row: jnp.sum(row * row), rows).reshape(g.shape[:dims])
