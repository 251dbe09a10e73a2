from __future__ import annotations

import re
from functools import partial

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.moe.dispatch import (
    choose_slots,
    combine_rows,
    gather_rows,
    invert,
    permute_rows,
    pool_capacity,
    pool_tables,
    queue_choices,
    sort_by_slot,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

# Three tokens, two choices each, four slots on two ranks. Rank 0 holds slots 0 and 1.
SLOT = jnp.array([[0, 2], [1, 0], [3, 1]], jnp.int32)
WEIGHT = jnp.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]])

queue_jit = jax.jit(queue_choices, static_argnames=("num_slots", "ranks"))
tables_jit = jax.jit(pool_tables, static_argnames=("capacity", "num_slots", "ranks"))


def test_queue_by_hand():
    queue = queue_jit(SLOT, WEIGHT, num_slots=4, ranks=2)
    # Rank 0: the first choices of tokens 0 (0.9) and 1 (0.6), then the second ones of 1 (0.4) and 2
    # (0.3). Rank 1: the first choice of token 2, then the second of token 0.
    assert queue.position_TK.tolist() == [[0, 1], [1, 2], [0, 3]]
    assert queue.longest == 4


def test_queue_puts_choice_before_weight_before_token():
    slot = jnp.zeros((3, 2), jnp.int32)
    weight = jnp.array([[0.2, 0.9], [0.5, 0.1], [0.5, 0.9]])
    assert queue_jit(slot, weight, num_slots=1, ranks=1).position_TK.tolist() == [
        [2, 3],
        [0, 5],
        [1, 4],
    ]


def test_pools_by_hand():
    queue = queue_jit(SLOT, WEIGHT, num_slots=4, ranks=2)
    tables, local = tables_jit(queue, 0, capacity=2, num_slots=4, ranks=2)
    # Choices are numbered token * 2 + k; rows 0 and 1 go to rank 0, rows 2 and 3 to rank 1; 4 is
    # none.
    assert tables.place_TK.tolist() == [[0, 3], [1, 4], [2, 4]]
    assert tables.source_M.tolist() == [0, 2, 4, 1]
    assert local.tolist() == [0, 1, 1, 0]
    tables, local = tables_jit(queue, 1, capacity=2, num_slots=4, ranks=2)
    assert tables.place_TK.tolist() == [[4, 4], [4, 0], [4, 1]]
    assert tables.source_M.tolist() == [3, 5, 6, 6]
    assert local.tolist() == [0, 1, 2, 2]  # slot 2 of 2 marks the empty rows


def test_padding_takes_no_row():
    slot = jnp.array([[4, 4], [1, 0], [4, 4]], jnp.int32)
    queue = queue_jit(slot, WEIGHT, num_slots=4, ranks=2)
    assert queue.longest == 2
    tables, local = tables_jit(queue, 0, capacity=2, num_slots=4, ranks=2)
    assert tables.place_TK.tolist() == [[4, 4], [0, 1], [4, 4]]
    assert tables.source_M.tolist() == [2, 3, 6, 6]
    assert local.tolist() == [1, 0, 2, 2]


def test_nothing_but_padding():
    queue = queue_jit(jnp.full((3, 2), 4, jnp.int32), WEIGHT, num_slots=4, ranks=2)
    assert queue.longest == 0
    tables, local = tables_jit(queue, 0, capacity=2, num_slots=4, ranks=2)
    assert np.all(tables.place_TK == 4) and np.all(tables.source_M == 6) and np.all(local == 2)


def test_sort_by_slot_by_hand():
    order, inverse, sizes = sort_by_slot(jnp.array([2, 0, 1, 0], jnp.int32), slots=2)
    assert order.tolist() == [1, 3, 2, 0]
    assert inverse.tolist() == [3, 0, 2, 1]
    assert sizes.tolist() == [2, 1]


def test_invert_ignores_places_past_the_end():
    assert invert(jnp.array([2, 5, 0, 9], jnp.int32), 5).tolist() == [2, 4, 0, 4, 4]


def test_replicas_take_turns_and_padding_goes_nowhere():
    slots, start, replicas = (jnp.array(a, jnp.int32) for a in ([0, 1, 3, 2], [0, 1, 3], [1, 2, 1]))
    expert = jnp.array([[1, 0], [1, 2], [3, 3], [1, 0], [0, 1]], jnp.int32)
    assert choose_slots(expert, slots, start, replicas, 0).tolist() == [
        [1, 0],
        [3, 2],
        [4, 4],
        [3, 0],
        [0, 1],
    ]
    assert choose_slots(expert, slots, start, replicas, 5).tolist() == [
        [3, 0],
        [1, 2],
        [4, 4],
        [1, 0],
        [0, 3],
    ]


@pytest.mark.parametrize(
    ("tokens", "top_k", "ranks", "factor", "rows"),
    [
        (8, 2, 4, 1.0, 4),
        (8, 2, 4, 1.25, 5),
        (5, 2, 4, 1.0, 3),
        (5, 2, 4, 100.0, 10),
        (1, 1, 8, 0.1, 1),
        (7, 3, 1, 1.0, 21),
    ],
)
def test_capacity_is_the_even_share_times_the_factor(tokens, top_k, ranks, factor, rows):
    assert pool_capacity(tokens, top_k, ranks, factor) == rows


# Tokens, choices, ranks, slots a rank: few shapes, so that few are compiled; the routings are
# arbitrary.
SHAPES = [(1, 1, 1, 1), (5, 2, 2, 3), (7, 3, 4, 1), (16, 2, 8, 2)]


@st.composite
def routings(draw):
    """Any slots, all alike or padding included, and weights with many ties."""
    tokens, top_k, ranks, slots = draw(st.sampled_from(SHAPES))
    slot = draw(hnp.arrays(np.int32, (tokens, top_k), elements=st.integers(0, ranks * slots - 1)))
    padding = draw(hnp.arrays(np.bool_, tokens))
    weight = draw(
        hnp.arrays(np.float32, (tokens, top_k), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    )
    capacity = draw(st.sampled_from([1, 3, tokens * top_k]))
    return (
        np.where(padding[:, None], ranks * slots, slot).astype(np.int32),
        weight,
        ranks,
        ranks * slots,
        capacity,
    )


@settings(max_examples=100, deadline=None)
@given(routings())
def test_every_choice_is_kept_once_or_dropped_for_better_ones(routing):
    slot, weight, ranks, num_slots, capacity = routing
    tokens, top_k = slot.shape
    none = ranks * capacity
    queue = queue_jit(slot, weight, num_slots=num_slots, ranks=ranks)
    rank, valid = slot // (num_slots // ranks), slot < num_slots
    counts = np.bincount(rank[valid], minlength=ranks)
    assert queue.longest == counts.max()

    carried = np.zeros((tokens, top_k), int)
    for round in range(-(-int(queue.longest) // capacity)):
        tables, local = (
            jax.tree.map(np.asarray, t)
            for t in tables_jit(queue, round, capacity=capacity, num_slots=num_slots, ranks=ranks)
        )
        kept = tables.place_TK < none
        carried += kept
        if round == 0:
            assert (
                kept.sum() == np.minimum(counts, capacity).sum()
            )  # a pool is full before anything is dropped
            # Nothing left out outranks what travels in the same pool.
            for r in range(ranks):
                keys = [(k, -weight[t, k], t) for t, k in np.argwhere(kept & (rank == r))]
                left = [(k, -weight[t, k], t) for t, k in np.argwhere(~kept & (rank == r))]
                assert not keys or not left or max(keys) < min(left)
        # A row of its own for each, in the pool of its rank, and tables that are each other's
        # inverse.
        places = tables.place_TK[kept]
        assert len(set(places.tolist())) == kept.sum()
        np.testing.assert_array_equal(places // capacity, rank[kept])
        np.testing.assert_array_equal(tables.source_M[places], np.flatnonzero(kept))
        np.testing.assert_array_equal(local[places], slot[kept] % (num_slots // ranks))
        empty = np.setdiff1d(np.arange(none), places)
        assert np.all(tables.source_M[empty] == tokens * top_k) and np.all(
            local[empty] == num_slots // ranks
        )
    np.testing.assert_array_equal(
        carried, valid
    )  # over all rounds each valid choice travels once, padding never


sort_jit = jax.jit(sort_by_slot, static_argnames="slots")


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int32, st.sampled_from([1, 9, 20]), elements=st.integers(0, 4)))
def test_sorted_rows_are_grouped_by_slot(local):
    order, inverse, sizes = (np.asarray(a) for a in sort_jit(local, slots=4))
    assert np.all(np.diff(local[order]) >= 0)
    np.testing.assert_array_equal(order[inverse], np.arange(local.size))
    np.testing.assert_array_equal(sizes, np.bincount(local, minlength=5)[:4])


@pytest.mark.parametrize("capacity", [1, 2, 6])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_equal_autodiff_of_plain_indexing(capacity, dtype):
    slot = jnp.array([[0, 2], [1, 0], [4, 4], [3, 1]], jnp.int32)  # token 2 is padding
    weight = jnp.array([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5], [0.7, 0.3]])
    queue = queue_jit(slot, weight, num_slots=4, ranks=2)
    tables, _ = tables_jit(queue, 0, capacity=capacity, num_slots=4, ranks=2)
    rng = np.random.default_rng(0)
    x, y = (jnp.array(rng.standard_normal((n, 3)), dtype) for n in (4, 2 * capacity))
    dy, dout = (jnp.array(rng.standard_normal((n, 3)), dtype) for n in (2 * capacity, 4))

    def plain_gather(x):
        return jnp.concatenate([x, jnp.zeros((1, 3), dtype)])[tables.source_M // 2]

    def plain_combine(y, weight):
        rows = jnp.concatenate([y, jnp.zeros((1, 3), dtype)])[tables.place_TK].astype(jnp.float32)
        return jnp.sum(rows * weight[..., None], axis=1).astype(dtype)

    tolerance = 1e-6 if dtype == jnp.float32 else 0.02
    pairs = [
        (lambda x: gather_rows(x, tables.source_M, tables.place_TK), plain_gather, (x,), dy),
        (
            lambda y, weight: combine_rows(y, weight, tables.source_M, tables.place_TK),
            plain_combine,
            (y, weight),
            dout,
        ),
    ]

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(fn, args, cotangent):
        out, pull = jax.vjp(fn, *args)
        return out, *pull(cotangent)

    for ours, plain, args, cotangent in pairs:
        got, want = (value_and_gradients(fn, args, cotangent) for fn in (ours, plain))
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance)


def test_permuted_rows_and_their_gradient():
    order, inverse, _ = sort_by_slot(jnp.array([2, 0, 1, 0], jnp.int32), slots=2)
    x, dy = jnp.arange(12.0).reshape(4, 3), 1 + jnp.arange(12.0).reshape(4, 3) ** 2
    y, pull = jax.vjp(lambda x: permute_rows(x, order, inverse), x)
    np.testing.assert_array_equal(y, np.asarray(x)[[1, 3, 2, 0]])
    np.testing.assert_array_equal(pull(dy)[0], np.asarray(dy)[[3, 0, 2, 1]])


def test_only_integers_are_scattered():
    """Activations are gathered in both directions: a scatter-add of them is what the hand-written
    VJPs are for.
    """
    queue = queue_jit(SLOT, WEIGHT, num_slots=4, ranks=2)

    def there_and_back(x, weight):
        tables, local = pool_tables(queue, 0, 2, 4, 2)
        rows = gather_rows(x, tables.source_M, tables.place_TK)
        rows = permute_rows(rows, *sort_by_slot(local, 2)[:2])
        return jnp.sum(combine_rows(rows, weight, tables.source_M, tables.place_TK) ** 2)

    jaxpr = str(jax.make_jaxpr(jax.grad(there_and_back, argnums=(0, 1)))(jnp.ones((3, 4)), WEIGHT))
    assert set(re.findall(r":(\w+)\[[\d,]*\] = scatter", jaxpr)) == {"i32"}
