"""Sequences that grow in a cache, against the same texts read by the training program: see
small_models.py.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.inference import kv_cache
from moe_jax.inference import session as module
from moe_jax.inference.kv_cache import CacheLayout, KVCache, bucket
from moe_jax.inference.session import LoadedModel, Session, prompt_width
from tests.support.small_models import VOCAB, Case, assert_same, case, load, make_plan


@pytest.fixture(scope="module")
def data() -> Case:
    return case("experts")


@pytest.fixture(scope="module")
def loaded(data: Case) -> LoadedModel:
    return load(data, {}, context=24)


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few shapes to compile, and edges that short texts cross: chunks of 4 and 2 tokens, caches of
    8, 16 and 24 places.
    """
    for place, name, value in (
        (module, "SHORTEST_PROMPT", 2),
        (module, "FIRST_CHUNK", 4),
        (module, "NEXT_CHUNK", 2),
        (kv_cache, "SHORTEST_CACHE", 8),
        (kv_cache, "STEP", 8),
    ):
        monkeypatch.setattr(place, name, value)


def test_buckets() -> None:
    sizes = [bucket(length, 16) for length in range(1, 3000)]
    assert sorted(set(sizes)) == [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert all(
        size >= length and (size == 16 or size < 2 * length) for length, size in enumerate(sizes, 1)
    )


def test_widths_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORTEST_PROMPT", 16)
    sizes = [prompt_width(length) for length in range(1, 3000)]
    assert sorted(set(sizes)) == [
        16,
        32,
        48,
        64,
        96,
        128,
        192,
        256,
        384,
        512,
        768,
        1024,
        1536,
        2048,
        3072,
    ]
    assert all(
        size >= length and (size <= 32 or size <= 1.5 * length)
        for length, size in enumerate(sizes, 1)
    )


def test_near_the_end_of_the_context_nothing_is_lost(data: Case, loaded: LoadedModel) -> None:
    """A short row's new tokens, padded behind a long row, need more room than the context has."""
    a, b = (list(map(int, text)) for text in data.texts)
    session = Session(loaded, batch=2)
    session.feed([a[:9], b[:1]])
    found = session.logits([a[9:10], b[1:9]])
    assert_same(found, np.stack([data.logits[0, 9], data.logits[1, 8]]))


def test_tokens_of_another_tokenizer_are_refused(loaded: LoadedModel) -> None:
    session = Session(loaded)
    with pytest.raises(UserError, match=f"token {VOCAB + 5} and the model a vocabulary of {VOCAB}"):
        session.feed([[1, VOCAB + 5]])
    assert session.lengths == [0]


def test_prompts_of_different_lengths_then_a_token_at_a_time(
    data: Case, loaded: LoadedModel
) -> None:
    """In chunks, some of which have nothing left of a row, and from one cache into a larger one."""
    a, b = (list(map(int, text)) for text in data.texts)
    session = Session(loaded, batch=2)
    assert session.lengths == [0, 0]
    assert_same(session.logits([a[:7], b[:2]]), np.stack([data.logits[0, 6], data.logits[1, 1]]))
    assert session.lengths == [7, 2]
    for step in range(3):
        assert_same(
            session.logits([a[7 + step : 8 + step], b[2 + step : 3 + step]]),
            np.stack([data.logits[0, 7 + step], data.logits[1, 2 + step]]),
        )
    assert session.lengths == [10, 5]


def test_rows_by_themselves_and_together(data: Case, loaded: LoadedModel) -> None:
    rows = [list(map(int, data.texts[0][:6])), list(map(int, data.texts[1][:3])), [5]]
    together = Session(loaded, batch=3).logits(rows)
    assert together.shape == (3, VOCAB) and together.dtype == np.float32
    for row, found in zip(rows, together, strict=True):
        assert_same(Session(loaded).logits([row])[0], found)


def test_a_row_rewound_forgets(data: Case, loaded: LoadedModel) -> None:
    """One of two rows goes back, to its middle and to its start, and the other does not notice."""
    a, b = (list(map(int, text)) for text in data.texts)
    session = Session(loaded, batch=2)
    session.feed([[*a[:3], 1, 2, 3, 4], b[:4]])
    session.rewind(0, 3)
    assert session.lengths == [3, 4]
    assert_same(session.logits([a[3:7], b[4:5]]), np.stack([data.logits[0, 6], data.logits[1, 4]]))
    session.rewind(0, 0)
    assert_same(session.logits([a[:5], b[5:6]]), np.stack([data.logits[0, 4], data.logits[1, 5]]))
    session.rewind(0, 0)
    session.rewind(1, 0)
    assert_same(session.logits([a[:5], b[:2]]), np.stack([data.logits[0, 4], data.logits[1, 1]]))
    with pytest.raises(ValueError, match="row 0 has 5 tokens"):
        session.rewind(0, 6)


def test_rows_that_the_mesh_does_not_divide(data: Case) -> None:
    session = Session(load(data, {"data": 2, "expert": 2}), batch=1)
    text = list(map(int, data.texts[0]))
    assert_same(session.logits([text[:4]]), data.logits[0, 3:4])
    assert_same(session.logits([text[4:5]]), data.logits[0, 4:5])
    assert session.lengths == [5]


def test_the_context_is_the_limit_and_nothing_changes_beyond_it(
    data: Case, loaded: LoadedModel
) -> None:
    text = list(map(int, data.texts[0]))
    session = Session(dataclasses.replace(loaded, context=6, name="small"))
    session.feed([text[:4]])
    with pytest.raises(UserError, match="7 tokens exceed the context of 6 tokens of small"):
        session.feed([text[4:7]])
    assert session.lengths == [4]
    assert_same(session.logits([text[4:6]]), data.logits[0, 5:6])


def test_what_feed_does_not_take(loaded: LoadedModel) -> None:
    session = Session(loaded, batch=2)
    for rows in ([[1]], [[1], []], [[1], [2], [3]]):
        with pytest.raises(ValueError, match="feed takes 2 rows"):
            session.feed(rows)
    assert session.lengths == [0, 0]


def test_logits_stay_on_the_devices(data: Case, loaded: LoadedModel) -> None:
    """Also where rows end in different chunks."""
    session = Session(loaded, batch=2)
    a, b = (list(map(int, text)) for text in data.texts)
    fed = session.feed([a[:7], b[:2]])
    assert isinstance(fed, jax.Array) and fed.shape == (2, VOCAB)
    assert_same(fed, np.stack([data.logits[0, 6], data.logits[1, 1]]))


# The cache by itself


def test_places_grow_in_few_sizes_up_to_the_context() -> None:
    wanted = {1: 8, 8: 8, 9: 16, 16: 16, 17: 24, 20: 24, 24: 24, 30: 32}
    assert {length: kv_cache.places_for(length, context=20) for length in wanted} == wanted


def test_rows_come_and_go(data: Case, loaded: LoadedModel) -> None:
    """A released row takes another text while its neighbour goes on, and nothing is moved."""
    cache = KVCache(loaded.engine.layout, batch=2, context=24)
    assert (cache.rows, cache.longest, cache.lengths) == (2, 0, [0, 0])
    arrays = cache.reserve(5)
    assert arrays[0][0].keys.shape[-1] == 8 and cache.reserve(8) is arrays
    cache.commit(arrays, [5, 3])
    assert cache.lengths == [5, 3] and cache.longest == 5
    assert cache.reserve(9)[0][0].keys.shape[-1] == 16
    cache.release(0)
    assert cache.lengths == [0, 3] and cache.longest == 3
    cache.rewind(1, 1)
    assert cache.lengths == [0, 1]
    for row, length in ((1, 2), (0, 1), (1, -1)):
        with pytest.raises(ValueError, match=f"row {row} has .* rewound to {length}"):
            cache.rewind(row, length)


def test_rows_of_the_cache_that_the_mesh_does_not_divide(data: Case) -> None:
    layout = CacheLayout(make_plan(data, {"data": 2, "expert": 2}))
    cache = KVCache(layout, batch=3, context=24)
    assert cache.rows == 4 and len(cache.lengths) == 3
    keys = cache.reserve(1)[0][0].keys
    assert keys.shape[1] == 4 and keys.sharding.shard_shape(keys.shape)[1] == 2
    grown = cache.reserve(9)[0][0].keys
    assert grown.shape[-1] == 16 and grown.sharding == keys.sharding
