"""What is drawn: against a plain full sort, by the frequencies of many draws, and where numbers are
extreme.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.generation.sampling import Sampler, SamplingOptions, distribution

# Likelihoods 1/8, 1/2, 1/8, 1/4.
LOGITS = np.log(np.array([0.125, 0.5, 0.125, 0.25])).astype(np.float32)


def shares(logits_V: np.ndarray, count: int = 4000, **options: float) -> np.ndarray:
    """How often each token is drawn."""
    sampler = Sampler(SamplingOptions(**{"temperature": 1.0, **options}))
    return (
        np.bincount([sampler.draw(logits_V) for _ in range(count)], minlength=len(logits_V)) / count
    )


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1e-9},
        {"temperature": 1e-45},
        {"top_k": 1},
        {"top_p": 0.0},
        {"top_p": 0.3},
        {"min_p": 1.0},
        {"min_p": 0.51},
        {"temperature": 0.0, "top_k": 3},
    ],
    ids=str,
)
def test_the_likeliest_alone(options: dict[str, float]) -> None:
    np.testing.assert_array_equal(shares(LOGITS, 50, **options), [0, 1, 0, 0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 99}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_p": 0.51}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8}, [1 / 7, 4 / 7, 0, 2 / 7]),  # of two equals the first
        ({"top_p": 1.0}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"min_p": 0.4}, [0, 2 / 3, 0, 1 / 3]),
        ({"min_p": 0.0}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_k": 3, "min_p": 0.2}, [1 / 7, 4 / 7, 0, 2 / 7]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
        ({"temperature": 0.5, "min_p": 0.2}, [0, 4 / 5, 0, 1 / 5]),  # after the temperature
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # of the two that are left the first has 2/3
    ],
    ids=str,
)
def test_frequencies(options: dict[str, float], expected: list[float]) -> None:
    drawn = shares(LOGITS, **options)
    np.testing.assert_allclose(drawn, expected, atol=0.025)
    np.testing.assert_array_equal(drawn > 0, np.array(expected) > 0)


def plain(logits_V: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """The same distribution over the whole vocabulary, by a full sort in f64."""
    order = np.argsort(-logits_V, kind="stable")
    scaled = logits_V[order].astype(np.float64) / options.temperature
    chance = np.exp(scaled - scaled[0])
    if options.top_k is not None:
        chance[options.top_k :] = 0
    chance /= chance.sum()
    if options.top_p is not None:
        chance[1:][(np.cumsum(chance) - chance)[1:] >= options.top_p] = 0
    if options.min_p is not None:
        chance[chance < options.min_p * chance[0]] = 0
    result = np.empty_like(chance)
    result[order] = chance / chance.sum()
    return result


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 40},
        {"top_p": 0.95},
        {"top_p": 0.999999},
        {"top_p": 0.05},
        {"min_p": 0.05},
        {"top_k": 500, "top_p": 0.8, "min_p": 0.01, "temperature": 0.6},
        {"top_p": 0.9, "min_p": 0.2, "temperature": 1.7},
    ],
    ids=str,
)
def test_distribution_equals_a_full_sort(options: dict[str, float], spread: float) -> None:
    logits_V = np.random.default_rng(1).normal(scale=spread, size=5003).astype(np.float32)
    settings = SamplingOptions(**{"temperature": 1.0, **options})
    ids, chance = distribution(logits_V, settings)
    found = np.zeros(len(logits_V))
    found[slice(None) if ids is None else ids] = chance / chance.sum(dtype=np.float64)
    expected = plain(logits_V, settings)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert (
        abs(int((found > 0).sum()) - int((expected > 0).sum())) <= 1
    )  # at an edge f32 and f64 may differ


def test_equal_logits_are_taken_in_order() -> None:
    level = np.zeros(1000, np.float32)
    ids, _ = distribution(level, SamplingOptions(temperature=1.0, top_k=5))
    np.testing.assert_array_equal(ids, np.arange(5))
    ids, _ = distribution(level, SamplingOptions(temperature=1.0, top_p=0.0075))
    np.testing.assert_array_equal(ids, np.arange(8))


def test_repetition_penalty_counts_prompt_and_what_was_drawn() -> None:
    sampler = Sampler(SamplingOptions(temperature=0.0, repetition_penalty=2.0))
    sampler.begin([0, 3, 77])
    # Token 0 falls from 3 to 1.5, token 3 from -1 to -2; an id beyond the vocabulary is no harm.
    assert sampler.draw(np.array([3.0, 2.0, 1.0, -1.0], np.float32)) == 1
    assert sampler.draw(np.array([3.0, 2.0, 1.6, -1.0], np.float32)) == 2  # now 1 counts too
    assert sampler.draw(np.array([-2.0, -9.0, -9.0, -1.5], np.float32)) == 3
    sampler.begin([])
    logits_V = np.array([3.0, 2.0, 1.0, -1.0], np.float32)
    assert sampler.draw(logits_V) == 0
    np.testing.assert_array_equal(logits_V, [3, 2, 1, -1])  # the caller's are left alone


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    logits_V = np.array([0, 0, 0, 9, 9], np.float32)
    assert {
        Sampler(SamplingOptions(seed=seed), num_ids=3).draw(logits_V) for seed in range(40)
    } == {0, 1, 2}


def test_extreme_logits() -> None:
    np.testing.assert_allclose(
        shares(np.array([3e38, 3e38, -3e38], np.float32), 2000), [0.5, 0.5, 0], atol=0.05
    )
    masked = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    for options in ({}, {"top_p": 0.9999}, {"top_k": 3}):
        np.testing.assert_allclose(shares(masked, 2000, **options), [0, 0.5, 0, 0.5], atol=0.05)
    for bad in (np.nan, np.inf):
        for temperature in (0.0, 1.0):
            with pytest.raises(UserError, match="logits are not finite"):
                Sampler(SamplingOptions(temperature=temperature)).draw(
                    np.array([0, bad, 1], np.float32)
                )


def test_the_seed_decides() -> None:
    def drawn(seed: int) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sampler.draw(LOGITS) for _ in range(30)]

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
    ],
    ids=str,
)
def test_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}=.* is out of range: it must be"):
        dataclasses.replace(SamplingOptions(), **wrong)


def test_a_large_vocabulary_is_not_sorted() -> None:
    """150,000 tokens: a full sort takes about 11 ms."""
    logits_V = np.random.default_rng(0).normal(scale=3, size=150_000).astype(np.float32)
    for options in ({}, {"top_k": 50}, {"top_p": 0.95}, {"min_p": 0.05}):
        sampler = Sampler(SamplingOptions(**options))
        best = np.inf
        for _ in range(20):
            start = time.perf_counter()
            sampler.draw(logits_V)
            best = min(best, time.perf_counter() - start)
        assert best < 0.006, options
