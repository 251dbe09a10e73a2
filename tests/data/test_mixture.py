"""Exact shares at any place, every window once per epoch, and any number of windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config.schema import DataConfig, MixtureSource
from moe_jax.data.corpus import Corpus, load_corpus
from moe_jax.data.mixture import Mixture, place_in_mixture, whole_weights
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
from tests.support.texts import packed

BYTES = load_tokenizer("bytes")


def test_weights_are_what_is_written() -> None:
    assert whole_weights([0.1, 0.2]) == (1, 2)
    assert whole_weights([1, 2.5]) == (2, 5)
    assert whole_weights([3, 10, 7]) == (3, 10, 7)  # grain would take 100 : 333 : 233
    assert whole_weights([1e-3, 1]) == (1, 1000)
    assert whole_weights([7]) == (1,)


@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(deadline=None)
def test_shares_are_exact_at_every_place(weights: list[int]) -> None:
    total = sum(weights)
    counts = [0] * len(weights)
    for place in range(3 * total):
        part, own = place_in_mixture(place, tuple(weights))
        assert own == counts[part]
        counts[part] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - weight * (place + 1) / total) < len(weights)
    assert counts == [3 * weight for weight in weights]


def mixture(tmp_path: Path, weights: tuple[float, float] = (1, 2.5)) -> Corpus:
    """A text of small letters in short windows, and one of capital letters, of other lengths."""
    random = np.random.RandomState(0)
    for name, letters, count in (("a", "abcdefg", 30), ("b", "ABCDEFG", 70)):
        words = ("".join(random.choice(list(letters), 50)) for _ in range(count))
        lines = (json.dumps({"text": word}) + "\n" for word in words)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    parts = tuple(
        MixtureSource(source=str(tmp_path / f"{name}.jsonl"), weight=weight)
        for name, weight in zip("ab", weights, strict=True)
    )
    config = DataConfig(mixture=parts, validation_fraction=0.2)
    return load_corpus(config, seq_len=16, seed=5)


def test_every_text_gives_its_share_and_all_its_windows(tmp_path: Path) -> None:
    corpus = mixture(tmp_path)
    assert len(corpus.train) == sum(map(len, corpus.train.parts))
    whole, parts = corpus.train_batches(14), [corpus.train_batches(14, p, 2) for p in range(2)]
    rows: list[bytes] = []
    for step in range(60):
        batch = next(whole)
        both = [next(part) for part in parts]
        for name, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([each[name] for each in both]), values)
        # A row of which most letters are small, of the first text.
        small = (batch["tokens"] >= ord("a")) & (batch["tokens"] <= ord("g"))
        assert (small.any(axis=1)).sum() == 4
        rows += [row.tobytes() for row in batch["tokens"]]
        if step == 20:
            state = json.loads(json.dumps(whole.get_state()))
            assert state == parts[1].get_state()
    first = [row for row in rows if any(ord("a") <= x <= ord("g") for x in row[::4])]
    size = len(corpus.train.parts[0])
    assert len(set(first[:size])) == size and sorted(first[:size]) == sorted(first[size : 2 * size])
    again = mixture(tmp_path).train_batches(14)
    again.set_state(state)
    assert [row.tobytes() for row in next(again)["tokens"]] == rows[21 * 14 : 22 * 14]
    held = corpus.validation_batches(7, 1)[0]["tokens"]
    assert ((held >= ord("a")) & (held <= ord("g"))).any(axis=1).sum() == 2


def test_what_decides_the_hash_of_a_mixture(tmp_path: Path) -> None:
    one = mixture(tmp_path)
    assert one.hash == mixture(tmp_path, (3, 1)).hash  # weights are settings that a run keeps
    assert one.hash != load_corpus(DataConfig(source=str(tmp_path / "a.jsonl")), 16, 0).hash


def test_a_mixture_that_cannot_be_validated_on_names_the_text(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds out \d+ sequences of data\.mixture\[0\] but a validation needs 100"
    ):
        mixture(tmp_path, (1, 1)).validation_batches(20, 10)
    with pytest.raises(UserError, match=r"^data\.mixture\[1\]\.source='nowhere' does not exist"):
        parts = (MixtureSource(source="builtin"), MixtureSource(source="nowhere"))
        load_corpus(DataConfig(mixture=parts), 16, 0)


def test_the_order_of_two_thousand_million_windows_takes_no_memory() -> None:
    few = packed([np.arange(40)], 4, BYTES)
    count = 2**31 + 5

    class Many:
        size = 4 * count

        def __len__(self) -> int:
            return count

    many: Any = Many()
    order = Mixture([many]).endless_order(seed=1)
    drawn = [order[place] for place in range(1000)]
    assert len(set(drawn)) == 1000 and min(drawn) >= 0 and 2**30 < max(drawn) < count
    assert order[count] != drawn[0]  # the next epoch has another order
    mixed = Mixture([few, many], [1, 3]).endless_order(seed=1)
    windows = [mixed[place] for place in range(40)]
    assert sorted(x for x in windows if x < len(few)) == list(range(len(few)))
    held = Mixture([many]).fixed_order(50)
    assert len(set(held.tolist())) == 50 and held.max() > 2**28
