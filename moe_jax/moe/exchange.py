"""Tokens to the devices of their experts and back: three ways, of which `strategy` chooses one.

gathered: every rank sees all tokens of the `expert` axis and computes its own slots' share.
pooled: rows travel in fixed-size pools; what finds no place in its pool is dropped.
pooled_in_rounds: the same pools, as many times as the fullest one needs; nothing is dropped.

Each is a function (route, x_TD, weight_TK, weights, slot_TK) -> Exchanged, inside `shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.config.model import MoEConfig
from moe_jax.moe import dispatch
from moe_jax.moe.experts import Grouped
from moe_jax.ops.grouped_matmul.api import GroupedMatmulImpl
from moe_jax.parallel.collectives import (
    MeshAxes,
    all_gather,
    all_to_all,
    axis_names,
    once,
    pmax,
    psum,
    rank,
    vary,
)
from moe_jax.runtime.platform import default_platform

# Pools are cut into chunks of at least so many bytes, where nobody says into how many: a transfer
# that takes less than what starting it takes hides nothing.
CHUNK_BYTES, MOST_CHUNKS = 16 << 20, 4
ROWS = 16


class Route(NamedTuple):
    """The static shape of an exchange."""

    axes: MeshAxes
    ranks: int
    slots: int  # P/R, of one rank
    capacity_factor: float
    limit: float | None  # of gpt-oss's SwiGLU
    impl: GroupedMatmulImpl
    chunks: int | None  # of a pool's rows, asked for

    def capacity(self, tokens: int, top_k: int) -> int:
        """Rows C of a pool for the choices of one device's tokens."""
        return dispatch.pool_capacity(tokens, top_k, self.ranks, self.capacity_factor)

    def chunk(self, capacity: int, row_bytes: int) -> int:
        """Rows of a pool that travel at once, so that the experts compute others meanwhile; a
        multiple of `ROWS` where it can be, which is what programs for accelerators cut well.
        """
        chunks = self.chunks
        if self.ranks == 1:
            chunks = 1
        elif chunks is None:
            size = self.ranks * capacity * row_bytes
            most = MOST_CHUNKS if default_platform().overlaps else 1
            chunks = max(min(size // CHUNK_BYTES, most), 1)
        rows = -(-capacity // chunks)
        return -(-rows // ROWS) * ROWS if ROWS < rows < capacity else rows


class Exchanged(NamedTuple):
    """What comes back."""

    y_TD: jax.Array  # each token's weighted sum over its experts; a part of a sum over `tensor`
    room: jax.Array  # rows that each rank takes from this device; those beyond are dropped
    rounds: jax.Array  # exchanges that were needed


Exchange = Callable[[Route, jax.Array, jax.Array, tuple[Any, ...], jax.Array], Exchanged]


def make_route(config: MoEConfig, axes: MeshAxes, slots: int) -> Route:
    """The route of a layer whose ranks have `slots` slots each."""
    return Route(
        axes,
        lax.axis_size(axes.expert),
        slots,
        config.capacity_factor,
        config.swiglu_limit,
        config.grouped_matmul,
        config.overlap_chunks,
    )


def strategy(config: MoEConfig, tokens: int, ranks: int) -> Exchange:
    """The way to the experts for `tokens` tokens per device."""
    capacity = dispatch.pool_capacity(tokens, config.top_k, ranks, config.capacity_factor)
    # One rank has nothing to send, and here nothing to drop.
    alone = ranks == 1 and (config.dropless or capacity == tokens * config.top_k)
    few = alone or tokens < config.gather_below
    if config.dispatch == "gather" or (config.dispatch == "auto" and few):
        return gathered
    return pooled_in_rounds if config.dropless else pooled


def gathered(
    route: Route,
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: tuple[Any, ...],
    slot_TK: jax.Array,
) -> Exchanged:
    """All tokens of the axis visit every rank, which computes its own slots' part of the sum."""
    args: tuple[Any, Any, Any] = vary((x_TD, weight_TK, weights), route.axes.all)
    x_TD, weight_TK, weights = args
    x_ND, weight_NK, slot_NK = (
        all_gather(a, route.axes.expert, 0) for a in (x_TD, weight_TK, slot_TK)
    )
    y_TD = own_share(route, x_ND, weight_NK, weights, slot_NK)
    if route.ranks > 1:
        start = lax.axis_index(route.axes.expert) * x_TD.shape[0]
        y_TD = lax.psum(y_TD, route.axes.expert)
        y_TD = lax.dynamic_slice_in_dim(y_TD, start, x_TD.shape[0])
    return Exchanged(y_TD, jnp.int32(slot_TK.size), jnp.int32(1))


def pooled(
    route: Route,
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: tuple[Any, ...],
    slot_TK: jax.Array,
) -> Exchanged:
    """One round: choices beyond a pool's capacity are dropped."""
    capacity = route.capacity(*slot_TK.shape)
    args: tuple[Any, Any, Any] = vary((x_TD, weight_TK, weights), route.axes.all)
    queue = dispatch.queue_choices(slot_TK, weight_TK, route.slots * route.ranks, route.ranks)
    y_TD = _exchange_round(route, *args, vary(queue, route.axes.all), 0)
    return Exchanged(y_TD, jnp.int32(capacity), jnp.int32(1))


def pooled_in_rounds(
    route: Route,
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: tuple[Any, ...],
    slot_TK: jax.Array,
) -> Exchanged:
    """As many rounds as the longest line on the mesh needs."""
    capacity = route.capacity(*slot_TK.shape)
    args: tuple[Any, Any, Any] = vary((x_TD, weight_TK, weights), route.axes.all)
    queue = dispatch.queue_choices(slot_TK, weight_TK, route.slots * route.ranks, route.ranks)
    rounds = jnp.maximum(1, -(-pmax(queue.longest, route.axes.batch) // capacity))
    room, exchange = rounds * capacity, partial(_exchange_round, route)
    y_TD = in_rounds(exchange, rounds, args, vary(queue, route.axes.all))
    return Exchanged(y_TD, room, rounds)


def _exchange_round(
    route: Route,
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: tuple[Any, ...],
    queue: dispatch.Queue,
    round: jax.Array | int,
) -> jax.Array:
    """Rows travel to their experts' ranks in pools [R*C, D], and their results travel back;
    [T, D].
    """
    capacity = route.capacity(*weight_TK.shape)
    tables, local_M = dispatch.pool_tables(
        queue, round, capacity, route.slots * route.ranks, route.ranks
    )
    # One row per rank: a TPU may pad a dim of size 1 to 128.
    slot_RC = all_to_all(local_M.reshape(route.ranks, capacity), route.axes.expert)
    cut = dispatch.Cut(route.ranks, route.chunk(capacity, x_TD[0].nbytes))
    rows = dispatch.gather_chunks(x_TD, tables.source_M, tables.place_TK, cut)
    returned = _through_experts(route, rows, cut.of(slot_RC.reshape(-1)), weights)
    return dispatch.combine_chunks(returned, weight_TK, tables.source_M, tables.place_TK, cut)


def _through_experts(
    route: Route, rows: list[jax.Array], slots: list[jax.Array], weights: tuple[Any, ...]
) -> list[jax.Array]:
    """Chunks of the pools' rows [R, C, D] to their experts' ranks and back, computed; `slots` are
    those of the rows that come, [R, C].

    While the experts compute the first half of chunk i, chunk i + 1 comes; during the second half,
    chunk i - 1 goes back. Nothing else travels then: a compiler that is free to begin transfers
    early begins most of them where there is nothing to compute, and holds all chunks at once.
    """
    arrived, computed, going = _exchange(route, rows[0]), None, None
    returned: list[jax.Array | None] = []
    for slot_RC, ahead in zip(slots, [*rows[1:], None], strict=True):
        experts, order_M, inverse_M = _sorted(route, slot_RC, weights)
        ahead, computed, going = _in_turn(ahead, computed, going)
        returned.append(going)
        coming = _exchange(route, ahead)
        rows_MD = arrived.reshape(-1, arrived.shape[-1])
        hidden_MF = experts.hidden(dispatch.permute_rows(rows_MD, order_M, inverse_M))
        hidden_MF, coming, computed = _in_turn(hidden_MF, coming, computed)
        going = _exchange(route, computed)
        computed_MD = dispatch.permute_rows(experts.output(hidden_MF), inverse_M, order_M)
        computed, arrived = computed_MD.reshape(arrived.shape), coming
    returned += [going, _exchange(route, computed)]
    return [rows_RCD for rows_RCD in returned if rows_RCD is not None]


def _in_turn(*arrays: jax.Array | None) -> tuple[Any, ...]:
    """What is given; whatever uses any of it, forward or backward, waits for all of it."""
    several = sum(x is not None for x in arrays) > 1
    return lax.optimization_barrier(arrays) if several else arrays


def _exchange(route: Route, rows_RCD: jax.Array | None) -> Any:
    """Rows r to rank r; as many came from it."""
    if rows_RCD is None:
        return None
    flat = rows_RCD.reshape(-1, rows_RCD.shape[-1])
    return all_to_all(flat, route.axes.expert).reshape(rows_RCD.shape)


def _sorted(
    route: Route, slots: jax.Array, weights: tuple[Any, ...], first: jax.Array | int = 0
) -> tuple[Grouped, jax.Array, jax.Array]:
    """The experts for rows that are sorted by slot, their order and its inverse; `slots` are the
    rows' own, in any shape.
    """
    order_M, inverse_M, sizes_P = dispatch.sort_by_slot(slots.reshape(-1), route.slots)
    return Grouped(sizes_P, weights, route.limit, route.impl, first), order_M, inverse_M


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


def share_in_order(
    route: Route,
    x_ND: jax.Array,
    weight_NK: jax.Array,
    weights: tuple[Any, ...],
    slot_NK: jax.Array,
    first: jax.Array | int = 0,
) -> jax.Array:
    """As `own_share`, but each token's whole sum in the order of its choices, on the first rank,
    and zeros on the others.

    A choice's row is of one rank and zeros are of the others, so that the sum over ranks rounds
    nothing, and the sum over choices does not depend on where their experts are.
    """
    y_MD, _, inverse_NK = own_rows(route, x_ND, weights, slot_NK, first)
    row_MD = psum(y_MD[inverse_NK.reshape(-1)], route.axes.expert)
    return once(dispatch.sum_choices(row_MD, weight_NK), axis_names(route.axes.expert))


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
    local_NK = slot_NK - rank(route.axes.expert) * route.slots
    local_NK = jnp.where((local_NK >= 0) & (local_NK < route.slots), local_NK, route.slots)
    experts, order_M, inverse_M = _sorted(route, local_NK, weights, first)
    inverse_NK = inverse_M.reshape(local_NK.shape)
    rows_MD = dispatch.gather_rows(x_ND, order_M, inverse_NK)
    return experts.output(experts.hidden(rows_MD)), order_M, inverse_NK


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_rounds(
    exchange, rounds: jax.Array, args: tuple[Any, ...], queue: dispatch.Queue
) -> jax.Array:
    """The sum of `exchange(*args, queue, r)` over rounds r, of which there are at least one.

    The first round is saved for the backward pass like any other computation. Later ones, rare when
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
