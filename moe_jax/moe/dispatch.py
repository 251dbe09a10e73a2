"""Moving tokens to the devices of their experts and back.

Rows travel in fixed-size pools, one per (source, destination) pair of ranks on the `expert` axis,
filled by the priority in `queue_choices`. Only int32 tables are scattered; activations are
gathered, in both directions and in both passes, by hand-written VJPs. Those of `gather_rows` and
`combine_rows` share one pair of tables: `source_M`, the choice that fills each row, and
`place_TK`, the row that each choice fills. A choice is token * K + k. An index one past the end
means "none" and reads as zeros. `permute_rows` puts all rows into another order.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops.products import einsum_f32
from moe_jax.parallel.collectives import vary_alike
from moe_jax.utils.annotations import Array, Float, Int

PRIORITY_VERSION = 1  # raise it when `queue_choices` orders choices differently
TABLES = "dispatch_tables"  # by this name the backward pass keeps what comes from sorting


class Queue(NamedTuple):
    """Where each choice goes: everything that any round of dispatch needs."""

    slot_TK: Int[Array, "T K"]  # slot, or P for none (padding)
    position_TK: Int[Array, "T K"]  # place in the line of the choices for the same rank
    longest: Int[Array, ""]  # choices in this device's longest line


class Tables(NamedTuple):
    """One round: what `dispatch` returns is what `combine` needs."""

    source_M: Int[Array, " M"]
    place_TK: Int[Array, "T K"]


class Cut(NamedTuple):
    """How M rows, in groups of equal length, are cut: into chunks of `size` rows of each group."""

    groups: int  # R
    size: int

    def of(self, rows_M: jax.Array) -> list[jax.Array]:
        """The chunks [R, C, ...] of rows [M, ...]."""
        rows = rows_M.reshape(self.groups, -1, *rows_M.shape[1:])
        return jnp.split(rows, list(range(self.size, rows.shape[1], self.size)), axis=1)

    def join(self, chunks: list[jax.Array]) -> jax.Array:
        """Rows [M, ...] of their chunks."""
        return jnp.concatenate(chunks, axis=1).reshape(-1, *chunks[0].shape[2:])


def _rows(x_ND: jax.Array, index: jax.Array) -> jax.Array:
    """Rows by index; an index past the end gives zeros. None is negative."""
    return x_ND.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gather(x_ND: jax.Array, source_M: jax.Array, place_NK: jax.Array, cut: Cut) -> list[jax.Array]:
    return [_rows(x_ND, source_RC // place_NK.shape[1]) for source_RC in cut.of(source_M)]


def _gather_fwd(x_ND: jax.Array, source_M: jax.Array, place_NK: jax.Array, cut: Cut):
    return _gather(x_ND, source_M, place_NK, cut), place_NK


def _gather_bwd(cut: Cut, place_NK: jax.Array, dchunks: list[jax.Array]):
    dy_MD = cut.join(dchunks)
    dx_ND = jnp.sum(_rows(dy_MD, place_NK), axis=1, dtype=jnp.float32)
    return dx_ND.astype(dy_MD.dtype), None, None


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather_chunks(
    x_ND: Float[Array, "N D"],
    source_M: Int[Array, " M"],
    place_NK: Int[Array, "N K"],
    cut: Cut,
) -> list[jax.Array]:
    """`gather_rows` in chunks [R, C, D] of the groups of rows."""
    return _gather(*vary_alike(x_ND, source_M, place_NK), cut)


def gather_rows(
    x_ND: Float[Array, "N D"], source_M: Int[Array, " M"], place_NK: Int[Array, "N K"]
) -> Float[Array, "M D"]:
    """Row m of the result is row source_M[m] // K of `x_ND`, or zeros for source_M[m] = N*K.

    `place_NK` is the inverse: the rows of the result that each row was copied to (M for none). The
    backward pass gathers and sums by it.
    """
    return gather_chunks(x_ND, source_M, place_NK, Cut(1, source_M.shape[0]))[0][0]


@jax.custom_vjp
def _permute(x_MD: jax.Array, order_M: jax.Array, inverse_M: jax.Array) -> jax.Array:
    # No index is past the end, so there is no second copy with zeros filled in.
    return x_MD.at[order_M].get(mode="promise_in_bounds", unique_indices=True)


def _permute_fwd(x_MD: jax.Array, order_M: jax.Array, inverse_M: jax.Array):
    return _permute(x_MD, order_M, inverse_M), (order_M, inverse_M)


def _permute_bwd(saved: tuple[jax.Array, jax.Array], dy_MD: jax.Array):
    order_M, inverse_M = saved
    return _permute(dy_MD, inverse_M, order_M), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


def permute_rows(
    x_MD: Float[Array, "M D"], order_M: Int[Array, " M"], inverse_M: Int[Array, " M"]
) -> Float[Array, "M D"]:
    """Row m of the result is row order_M[m] of `x_MD`; the backward pass gathers by the inverse."""
    return _permute(*vary_alike(x_MD, order_M, inverse_M))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _combine(
    chunks: list[jax.Array],
    weight_TK: jax.Array,
    source_M: jax.Array,
    place_TK: jax.Array,
    cut: Cut,
) -> jax.Array:
    y_MD = cut.join(chunks)
    return einsum_f32("tkd,tk->td", _rows(y_MD, place_TK), weight_TK).astype(y_MD.dtype)


def _combine_fwd(
    chunks: list[jax.Array],
    weight_TK: jax.Array,
    source_M: jax.Array,
    place_TK: jax.Array,
    cut: Cut,
):
    saved = (chunks, weight_TK, source_M, place_TK)
    return _combine(*saved, cut), saved


def _combine_bwd(cut: Cut, saved: tuple[Any, ...], dout_TD: jax.Array):
    chunks, weight_TK, source_M, place_TK = saved
    weights = cut.of(_rows(weight_TK.reshape(-1), source_M))
    dchunks, dweights = [], []
    for y_RCD, source_RC, weight_RC in zip(chunks, cut.of(source_M), weights, strict=True):
        dout_RCD = _rows(dout_TD, source_RC // weight_TK.shape[1]).astype(jnp.float32)
        dchunks.append((dout_RCD * weight_RC[..., None]).astype(y_RCD.dtype))
        dweights.append(jnp.sum(y_RCD.astype(jnp.float32) * dout_RCD, axis=-1))
    dweight_TK = _rows(cut.join(dweights), place_TK)
    return dchunks, dweight_TK.astype(weight_TK.dtype), None, None


_combine.defvjp(_combine_fwd, _combine_bwd)


def combine_chunks(
    chunks: list[jax.Array],
    weight_TK: Float[Array, "T K"],
    source_M: Int[Array, " M"],
    place_TK: Int[Array, "T K"],
    cut: Cut,
) -> Float[Array, "T D"]:
    """`combine_rows` of rows that come in chunks [R, C, D] of their groups."""
    *chunks, weight_TK, source_M, place_TK = vary_alike(*chunks, weight_TK, source_M, place_TK)
    return _combine(chunks, weight_TK, source_M, place_TK, cut)


def combine_rows(
    y_MD: Float[Array, "M D"],
    weight_TK: Float[Array, "T K"],
    source_M: Int[Array, " M"],
    place_TK: Int[Array, "T K"],
) -> Float[Array, "T D"]:
    """Each token's K rows of `y_MD`, weighted and summed in f32; a choice without a row counts as
    zero.
    """
    cut = Cut(1, source_M.shape[0])
    return combine_chunks([y_MD[None]], weight_TK, source_M, place_TK, cut)


def sum_choices(
    row_MD: Float[Array, "TK D"], weight_TK: Float[Array, "T K"]
) -> Float[Array, "T D"]:
    """`combine_rows` of rows that lie in the order of the choices."""
    choice_M = jnp.arange(row_MD.shape[0], dtype=jnp.int32)
    return combine_rows(row_MD, weight_TK, choice_M, choice_M.reshape(weight_TK.shape))


def choose_slots(
    expert_TK: Int[Array, "T K"],
    slots_P: Int[Array, " P"],
    start_E: Int[Array, " E"],
    replicas_E: Int[Array, " E"],
    turn: jax.Array | int,
) -> Int[Array, "T K"]:
    """The slot for each choice of a logical expert: replicas take turns by token, from `turn` on.
    Expert E (padding) gives slot P.

    `slots_P` lists slots by expert; those of expert e that these tokens may use are `replicas_E[e]`
    from `start_E[e]` on.
    """
    num_experts, num_slots = start_E.shape[0], slots_P.shape[0]
    expert = jnp.minimum(expert_TK, num_experts - 1)
    token_T1 = jnp.arange(expert_TK.shape[0], dtype=jnp.int32)[:, None] + turn
    turn_TK = lax.rem(*jnp.broadcast_arrays(token_T1, _entries(replicas_E, expert)))
    slot_TK = _entries(slots_P, _entries(start_E, expert) + turn_TK)
    return jnp.where(expert_TK < num_experts, slot_TK, num_slots).astype(jnp.int32)


def _entries(table: jax.Array, index: jax.Array) -> jax.Array:
    """Entries of a table by indices that are inside it: said so, they need no code for others."""
    return table.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def queue_choices(
    slot_TK: Int[Array, "T K"], weight_TK: Float[Array, "T K"], num_slots: int, ranks: int
) -> Queue:
    """Lines up this device's choices for each rank.

    Priority (version 1): choice rank first (every token's best choice before any second choice),
    then the larger router weight, then the earlier token. Each source has pools of its own, so no
    rank is favoured.
    """
    tokens, top_k = slot_TK.shape
    # Each column is sorted by itself, and a choice's place in its line is then counted: sorting all
    # choices by rank, column and weight takes a TPU's compiler twice as long.
    token_KT = lax.broadcasted_iota(jnp.int32, (top_k, tokens), 1)
    key_KT = -lax.stop_gradient(weight_TK).T
    _, order_KT = lax.sort((key_KT, token_KT), dimension=1, num_keys=1, is_stable=True)
    # Padding goes to rank R, which no device is.
    rank_KT = (slot_TK // (num_slots // ranks)).T
    sorted_rank_N = jnp.take_along_axis(rank_KT, order_KT, axis=1).reshape(-1)
    in_line_RN = sorted_rank_N == jnp.arange(ranks + 1)[:, None]
    count_RN = jnp.cumsum(in_line_RN, axis=1, dtype=jnp.int32)
    position_N = jnp.sum(jnp.where(in_line_RN, count_RN, 0), axis=0) - 1
    choice_N = (order_KT * top_k + jnp.arange(top_k, dtype=jnp.int32)[:, None]).reshape(-1)
    position_N = jnp.zeros_like(choice_N).at[choice_N].set(position_N, unique_indices=True)
    position_TK = checkpoint_name(position_N.reshape(tokens, top_k), TABLES)
    return Queue(slot_TK, position_TK, jnp.max(count_RN[:ranks, -1]))


def pool_tables(
    queue: Queue, round: Int[Array, ""] | int, capacity: int, num_slots: int, ranks: int
) -> tuple[Tables, jax.Array]:
    """Tables of one round, and the local slot of each pool row, int32 [R*C] (P/R for an empty row).

    Round r carries the choices whose position in line is r*C to (r+1)*C - 1.
    """
    slots = num_slots // ranks
    travels_TK = (queue.slot_TK < num_slots) & (queue.position_TK // capacity == round)
    place_TK = (queue.slot_TK // slots) * capacity + queue.position_TK % capacity
    place_TK = jnp.where(travels_TK, place_TK, ranks * capacity)
    source_M = invert(place_TK.reshape(-1), ranks * capacity)
    local_M = jnp.concatenate(
        [queue.slot_TK.reshape(-1) % slots, jnp.full((1,), slots, jnp.int32)]
    )[source_M]
    return Tables(source_M, place_TK), local_M


def invert(place_N: Int[Array, " N"], rows: int) -> Int[Array, " M"]:
    """The index n with place_N[n] = m for each row m, or N where there is none; places at or past
    `rows` are ignored.
    """
    size = place_N.shape[0]
    # One more row takes what goes nowhere: not every back end drops an out-of-bounds scatter.
    source = (
        jnp.full((rows + 1,), size, jnp.int32)
        .at[jnp.minimum(place_N, rows)]
        .set(jnp.arange(size, dtype=jnp.int32), mode="promise_in_bounds")
    )
    return source[:rows]


def sort_by_slot(local_N: Int[Array, " N"], slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Order of rows by local slot (empty rows, those of slot `slots`, come last), its inverse, and
    rows per slot [P/R].
    """
    order_N = checkpoint_name(jnp.argsort(local_N, stable=True).astype(jnp.int32), TABLES)
    sizes_P = jnp.sum(local_N[:, None] == jnp.arange(slots), axis=0, dtype=jnp.int32)
    return order_N, invert(order_N, local_N.shape[0]), sizes_P


def pool_capacity(tokens: int, top_k: int, ranks: int, capacity_factor: float) -> int:
    """Rows C per pool: the even share of this device's choices times the factor, at least 1 and at
    most all of them.
    """
    return int(min(tokens * top_k, max(1, np.ceil(capacity_factor * tokens * top_k / ranks))))
