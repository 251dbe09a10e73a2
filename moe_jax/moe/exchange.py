"""Tokens to the devices of their experts and back: three ways."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.moe import dispatch
from moe_jax.moe.experts import apply_experts
from moe_jax.ops.grouped_matmul.api import GroupedMatmulImpl
from moe_jax.parallel.collectives import all_gather, all_to_all


class Route(NamedTuple):
    """The static shape of an exchange."""

    ranks: int
    slots: int  # P, over all ranks
    capacity: int  # C
    limit: float | None  # of gpt-oss's SwiGLU
    impl: GroupedMatmulImpl


def pooled_exchange(
    route: Route,
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: tuple[Any, ...],
    queue: dispatch.Queue,
    round: jax.Array | int,
) -> jax.Array:
    """One round: rows travel to their experts' ranks in pools [R*C, D], and their results travel
    back; [T, D].
    """
    tables, local_M = dispatch.pool_tables(queue, round, route.capacity, route.slots, route.ranks)
    received_MD = all_to_all(dispatch.gather_rows(x_TD, tables.source_M, tables.place_TK), "expert")
    slot_M = all_to_all(local_M, "expert")
    order_M, inverse_M, sizes_P = dispatch.sort_by_slot(slot_M, route.slots // route.ranks)
    sorted_MD = dispatch.gather_rows(received_MD, order_M, inverse_M[:, None])
    computed_MD = apply_experts(sorted_MD, sizes_P, weights, limit=route.limit, impl=route.impl)
    returned_MD = all_to_all(
        dispatch.gather_rows(computed_MD, inverse_M, order_M[:, None]), "expert"
    )
    return dispatch.combine_rows(returned_MD, weight_TK, tables.source_M, tables.place_TK)


def gather_exchange(
    route: Route,
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: tuple[Any, ...],
    slot_TK: jax.Array,
) -> jax.Array:
    """All tokens of the axis visit every rank, which computes its own slots' part of the sum; [T,
    D]. Drops nothing.
    """
    x_ND, weight_NK, slot_NK = (all_gather(a, "expert", 0) for a in (x_TD, weight_TK, slot_TK))
    y_ND = own_share(route, x_ND, weight_NK, weights, slot_NK)
    if route.ranks == 1:
        return y_ND
    start = lax.axis_index("expert") * x_TD.shape[0]
    return lax.dynamic_slice_in_dim(lax.psum(y_ND, "expert"), start, x_TD.shape[0])


def own_share(
    route: Route,
    x_ND: jax.Array,
    weight_NK: jax.Array,
    weights: tuple[Any, ...],
    slot_NK: jax.Array,
    first: jax.Array | int = 0,
) -> jax.Array:
    """The part of each token's sum over its choices that this rank's slots compute; [N, D]. Slot 0
    here has weights number `first`.
    """
    y_MD, order_M, inverse_NK = own_rows(route, x_ND, weights, slot_NK, first)
    return dispatch.combine_rows(y_MD, weight_NK, order_M, inverse_NK)


def own_rows(
    route: Route,
    x_ND: jax.Array,
    weights: tuple[Any, ...],
    slot_NK: jax.Array,
    first: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Outputs of this rank's slots by slot [N*K, D], zeros at the end for choices of others; the
    choice in each row; the row of each.
    """
    slots = route.slots // route.ranks
    local_NK = slot_NK - lax.axis_index("expert") * slots
    local_NK = jnp.where((local_NK >= 0) & (local_NK < slots), local_NK, slots)
    order_M, inverse_M, sizes_P = dispatch.sort_by_slot(local_NK.reshape(-1), slots)
    inverse_NK = inverse_M.reshape(local_NK.shape)
    rows_MD = dispatch.gather_rows(x_ND, order_M, inverse_NK)
    y_MD = apply_experts(rows_MD, sizes_P, weights, limit=route.limit, impl=route.impl, first=first)
    return y_MD, order_M, inverse_NK


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_rounds(
    exchange, rounds: jax.Array, args: tuple[Any, ...], queue: dispatch.Queue
) -> jax.Array:
    """The sum of `exchange(*args, queue, r)` over rounds r, of which there are at least one.

    The first round is saved for the backward pass like any other computation; later ones, rare when
    load is even, run in a loop whose backward pass replays them, so memory does not grow with their
    number.
    """
    return _in_rounds_fwd(exchange, rounds, args, queue)[0]


def _in_rounds_fwd(exchange, rounds: jax.Array, args: tuple[Any, ...], queue: dispatch.Queue):
    y_TD, pull = jax.vjp(lambda *a: exchange(*a, queue, 0), *args)

    def step(c):
        return (c[0] + 1, c[1] + exchange(*args, queue, c[0]))

    _, y_TD = lax.while_loop(lambda c: c[0] < rounds, step, (jnp.int32(1), y_TD))
    return y_TD, (pull, rounds, args, queue)


def _in_rounds_bwd(exchange, saved, dy_TD: jax.Array):
    pull, rounds, args, queue = saved

    def step(carry):
        round, grads = carry
        _, pull_round = jax.vjp(lambda *a: exchange(*a, queue, round), *args)
        return round + 1, jax.tree.map(jnp.add, grads, pull_round(dy_TD))

    _, grads = lax.while_loop(lambda c: c[0] < rounds, step, (jnp.int32(1), pull(dy_TD)))
    return None, grads, None


in_rounds.defvjp(_in_rounds_fwd, _in_rounds_bwd)
