"""What the backward pass keeps and what it computes again, by the names that JAX gives primitives.

A policy by name says nothing when JAX renames one, so a known program is counted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from moe_jax.models.remat import MOVES, remat
from moe_jax.moe.dispatch import (
    TABLES,
    combine_rows,
    gather_rows,
    permute_rows,
    pool_tables,
    queue_choices,
    sort_by_slot,
)

MESH = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def primitives(jaxpr: Any) -> Iterator[str]:
    """The names of all primitives in a program, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


def counted(body: Any, *args: Any) -> Counter[str]:
    return Counter(primitives(jax.make_jaxpr(body)(*args).jaxpr))


def backward(choice: str) -> Counter[str]:
    """The primitives of a gradient through two layers whose weights are gathered."""

    def layer(x_TD: jax.Array, w_DD: jax.Array) -> jax.Array:
        whole_DD = lax.all_gather(w_DD.astype(jnp.bfloat16), "data", axis=0, tiled=True)
        whole_DD = whole_DD.reshape(2, 2, 4).transpose(1, 0, 2).reshape(4, 4)
        return jnp.tanh(x_TD @ whole_DD)

    def loss(weights: list[jax.Array], x_TD: jax.Array) -> jax.Array:
        for w_DD in weights:
            x_TD = remat(choice, layer)(x_TD, w_DD)
        return lax.psum(jnp.sum(x_TD.astype(jnp.float32)), "data")

    gradient = jax.shard_map(
        jax.grad(loss), mesh=MESH, in_specs=(P("data"), P("data")), out_specs=P("data")
    )
    return counted(gradient, [jnp.ones((4, 4))] * 2, jnp.ones((8, 4), jnp.bfloat16))


def test_every_name_of_the_policy_is_one_that_jax_still_has():
    """`pvary` and `pcast` are one primitive in different releases of JAX."""

    def moves(x: jax.Array, start: jax.Array) -> Any:
        y = lax.all_gather(x, "data", axis=0, tiled=True).astype(jnp.bfloat16)
        y = lax.dynamic_slice_in_dim(y.T.reshape(2, -1, 1)[:, 1:3, 0], start, 1)
        constant = lax.pcast(jnp.arange(3.0), ("data",), to="varying")
        return y, jnp.broadcast_to(constant, (2, 3))

    names = counted(
        jax.shard_map(moves, mesh=MESH, in_specs=(P("data"), P()), out_specs=P("data")),
        jnp.ones((8, 2)),
        jnp.int32(0),
    )
    missing = MOVES - names.keys()
    assert missing == {"pvary"} or missing == {"pcast"}, missing


@pytest.mark.parametrize(
    ("choice", "gathers", "products", "tanhs"),
    [("none", 3, 5, 2), ("dots", 3, 5, 4), ("full", 4, 7, 4)],
)
def test_gathered_weights_are_never_kept_and_results_as_asked(choice, gathers, products, tanhs):
    """Forward there are two gathers, products and tanhs. Backward there are three products, since
    the first layer's input needs no gradient, and the second layer's weight is gathered again. What
    is more was computed again.
    """
    names = backward(choice)
    assert names["all_gather"] == gathers
    assert names["dot_general"] == products
    assert names["tanh"] == tanhs


@pytest.mark.parametrize("choice", ["none", "dots", "full"])
def test_the_backward_pass_sorts_nothing_again(choice):
    """Every program that the layer needs twice is made twice, and a sort is the slowest of them."""

    def layer(x_TD: jax.Array) -> jax.Array:
        weight_TK, expert_TK = lax.top_k(x_TD, 2)
        queue = queue_choices(checkpoint_name(expert_TK, TABLES), weight_TK, 4, 2)
        tables, local_M = pool_tables(queue, 0, 3, 4, 2)
        order_M, inverse_M, _ = sort_by_slot(local_M, 2)
        rows_MD = gather_rows(jnp.tanh(x_TD), tables.source_M, tables.place_TK)
        rows_MD = permute_rows(permute_rows(rows_MD, order_M, inverse_M), inverse_M, order_M)
        return combine_rows(rows_MD, weight_TK, tables.source_M, tables.place_TK)

    gradient = jax.grad(lambda x_TD: jnp.sum(remat(choice, layer)(x_TD)))
    assert counted(gradient, jnp.arange(12.0).reshape(3, 4))["sort"] == 2
