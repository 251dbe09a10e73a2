"""What is drawn: against a plain numpy reference, by the frequencies of many draws, and where
numbers are extreme; and that only tokens leave the devices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.generation import sampling
from moe_jax.generation.sampling import Filters, Sampler
from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.parallel.mesh import make_mesh
from tests.support.small_models import VOCAB, case, load

# Likelihoods 1/8, 1/2, 1/8, 1/4.
LOGITS = np.log(np.array([0.125, 0.5, 0.125, 0.25])).astype(np.float32)


def options_of(changes: dict[str, Any]) -> SamplingOptions:
    return SamplingOptions(**{"temperature": 1.0, **changes})


def draws(logits_V: np.ndarray, count: int, **changes: Any) -> np.ndarray:
    """Tokens that `count` rows of different seeds draw from the same logits."""
    sampler = Sampler([options_of({"seed": seed, **changes}) for seed in range(count)])
    return sampler.draw(np.tile(logits_V, (count, 1)))


def shares(logits_V: np.ndarray, count: int = 4000, **changes: Any) -> np.ndarray:
    """How often each token is drawn."""
    return np.bincount(draws(logits_V, count, **changes), minlength=len(logits_V)) / count


def chances(logits_V: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """The chances that the program draws by, normalised in f64."""
    rows = sampling.row_options([options])
    filters = Filters(True, options.top_k is not None, options.top_p is not None, True, False)
    found = np.asarray(sampling.chances(filters, jnp.asarray(logits_V)[None], rows))[0]
    return found / found.sum(dtype=np.float64)


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


FILTERS = [
    {},
    {"top_k": 40},
    {"top_p": 0.95},
    {"top_p": 0.999999},
    {"top_p": 0.05},
    {"min_p": 0.05},
    {"top_k": 500, "top_p": 0.8, "min_p": 0.01, "temperature": 0.6},
    {"top_p": 0.9, "min_p": 0.2, "temperature": 1.7},
]


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_chances_equal_those_of_a_full_sort(options: dict[str, float], spread: float) -> None:
    logits_V = np.random.default_rng(1).normal(scale=spread, size=5003).astype(np.float32)
    settings = options_of(options)
    found, expected = chances(logits_V, settings), plain(logits_V, settings)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert (
        abs(int((found > 0).sum()) - int((expected > 0).sum())) <= 1
    )  # at an edge f32 and f64 may differ


@pytest.mark.parametrize("options", [*FILTERS[:4], FILTERS[-2]], ids=str)
def test_tokens_are_drawn_by_their_chances(options: dict[str, float]) -> None:
    """20,000 draws among 40 tokens: within five standard deviations of each chance."""
    logits_V = np.random.default_rng(3).normal(scale=1.5, size=40).astype(np.float32)
    count, expected = 20_000, plain(logits_V, options_of(options))
    drawn = shares(logits_V, count, **options)
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(drawn - expected) <= 5 * deviation + 1e-9).all()
    assert not drawn[expected == 0].any()


@pytest.mark.parametrize(
    "options", [*FILTERS[1:], {"repetition_penalty": 1.3, "top_k": 9}], ids=str
)
def test_the_tokens_that_are_left_are_those_of_transformers(options: dict[str, float]) -> None:
    """Its processors, in the order of its `generate`."""
    torch = pytest.importorskip("torch")
    import transformers

    logits_V = np.random.default_rng(5).normal(scale=2, size=2003).astype(np.float32)
    prompt, settings = [7, 3, 1999, 3], options_of(options)
    scores, ids = torch.tensor(logits_V)[None], torch.tensor(prompt)[None]
    processors = (
        ("RepetitionPenaltyLogitsProcessor", settings.repetition_penalty),
        ("TemperatureLogitsWarper", settings.temperature),
        ("TopKLogitsWarper", settings.top_k),
        ("TopPLogitsWarper", settings.top_p),
        ("MinPLogitsWarper", settings.min_p),
    )
    for name, value in processors:
        if value is not None:
            scores = getattr(transformers, name)(value)(ids, scores)
    expected = torch.softmax(scores.double(), dim=-1)[0].numpy()
    occurred = np.isin(np.arange(len(logits_V)), prompt)
    penalised = sampling.penalised(
        jnp.asarray(logits_V), jnp.asarray(occurred), jnp.float32(settings.repetition_penalty)
    )
    found = chances(np.asarray(penalised), settings)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert abs(int((found > 0).sum()) - int((expected > 0).sum())) <= 1


def test_equal_logits_are_taken_in_order() -> None:
    level = np.zeros(1000, np.float32)
    np.testing.assert_array_equal(
        np.flatnonzero(chances(level, options_of({"top_k": 5}))), range(5)
    )
    found = chances(level, options_of({"top_p": 0.0075}))
    np.testing.assert_array_equal(np.flatnonzero(found), range(8))
    signed = np.array([-0.0, 0.0, -1.0, 0.0], np.float32)  # a zero is a zero
    np.testing.assert_array_equal(np.flatnonzero(chances(signed, options_of({"top_k": 2}))), [0, 1])


def one_row(logits: list[float]) -> np.ndarray:
    return np.array([logits], np.float32)


def test_repetition_penalty_counts_prompt_and_what_was_drawn() -> None:
    sampler = Sampler([SamplingOptions(temperature=0.0, repetition_penalty=2.0)])
    sampler.begin([0, 3, 77])
    # Token 0 falls from 3 to 1.5, token 3 from -1 to -2; an id beyond the vocabulary is no harm.
    assert sampler.draw(one_row([3.0, 2.0, 1.0, -1.0])) == [1]
    assert sampler.draw(one_row([3.0, 2.0, 1.6, -1.0])) == [2]  # now 1 counts too
    assert sampler.draw(one_row([-2.0, -9.0, -9.0, -1.5])) == [3]
    sampler.begin([])
    logits_BV = one_row([3.0, 2.0, 1.0, -1.0])
    assert sampler.draw(logits_BV) == [0]
    np.testing.assert_array_equal(logits_BV, [[3, 2, 1, -1]])  # the caller's are left alone


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    logits_V = np.array([0, 0, 0, 9, 9], np.float32)
    rows = [options_of({"seed": seed}) for seed in range(40)]
    assert set(Sampler(rows, num_ids=3).draw(np.tile(logits_V, (40, 1)))) == {0, 1, 2}


def test_extreme_logits() -> None:
    np.testing.assert_allclose(
        shares(np.array([3e38, 3e38, -3e38], np.float32), 2000), [0.5, 0.5, 0], atol=0.05
    )
    masked = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    for options in ({}, {"top_p": 0.9999}, {"top_k": 3}):
        np.testing.assert_allclose(shares(masked, 2000, **options), [0, 0.5, 0, 0.5], atol=0.05)
    for bad in (np.nan, np.inf, -np.inf):
        logits_BV = np.array([[0, 1, 2], [bad, bad, bad]], np.float32)
        for temperature in (0.0, 1.0):
            rows = [SamplingOptions(temperature=temperature)] * 2
            with pytest.raises(UserError, match="logits are not finite"):
                Sampler(rows).draw(logits_BV)
    with pytest.raises(UserError, match="logits are not finite"):
        Sampler([SamplingOptions()]).draw(one_row([0, np.nan, 1]))


def test_the_seed_decides() -> None:
    def drawn(seed: int) -> list[int]:
        sampler = Sampler([options_of({"seed": seed})])
        return [int(sampler.draw(LOGITS[None])[0]) for _ in range(30)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(2**70) != drawn(2**70 + 1)  # of any size


ROWS = [
    SamplingOptions(temperature=0.0),
    SamplingOptions(temperature=1.3, seed=4),
    SamplingOptions(temperature=0.9, top_p=0.8, seed=5),
    SamplingOptions(temperature=1.0, top_k=7, repetition_penalty=1.4, seed=6),
    SamplingOptions(temperature=2.0, min_p=0.1, seed=7),
]


def drawn_together(rows: list[SamplingOptions], logits_SBV: np.ndarray) -> np.ndarray:
    """Tokens [S, B] of steps one after another."""
    sampler = Sampler(rows, num_ids=95)
    for row in range(len(rows)):
        sampler.begin([row, 3], row)
    return np.stack([sampler.draw(logits_BV) for logits_BV in logits_SBV])


def test_a_row_draws_the_same_whoever_else_is_there() -> None:
    """Rows with options of their own, by themselves, together and in another order."""
    logits_SBV = np.random.default_rng(0).normal(size=(12, 5, 97)).astype(np.float32)
    together = drawn_together(ROWS, logits_SBV)
    for row, options in enumerate(ROWS):
        sampler = Sampler([options], num_ids=95)
        sampler.begin([row, 3])
        alone = [int(sampler.draw(logits_BV[row : row + 1])[0]) for logits_BV in logits_SBV]
        np.testing.assert_array_equal(alone, together[:, row])
    np.testing.assert_array_equal(together[:, 0], logits_SBV[:, 0, :95].argmax(-1))
    assert together.max() < 95
    with pytest.raises(ValueError, match="the logits have 2 rows, the options 5"):
        Sampler(ROWS).draw(logits_SBV[0, :2])


@pytest.mark.parametrize("axes", [{"expert": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_a_mesh_draws_what_one_device_draws(axes: dict[str, int]) -> None:
    rows = ROWS[1:]
    logits_SBV = np.random.default_rng(0).normal(size=(6, 4, 97)).astype(np.float32)
    config = MeshConfig(**axes)
    mesh = make_mesh(config, jax.devices()[: config.size])
    spread = [
        jax.device_put(logits_BV, NamedSharding(mesh, PartitionSpec("data")))
        for logits_BV in logits_SBV
    ]
    np.testing.assert_array_equal(drawn_together(rows, spread), drawn_together(rows, logits_SBV))


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({}, id="one", marks=pytest.mark.slow),
        pytest.param(dict(data=2, expert=2), id="four"),
    ],
)
def test_only_tokens_leave_the_devices(
    mesh: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step and the draw behind it fetch one array, a token per row. The logits are an array of
    the devices, and nothing with the vocabulary's dim is fetched.
    """
    data = case("experts")
    session, fetched = load(data, mesh).session(2), []
    sampler = Sampler([SamplingOptions(temperature=0.9, top_p=0.9), SamplingOptions(0.0)])
    whole = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or whole(tree))
    tokens = sampler.draw(session.feed([text[:4].tolist() for text in data.texts]))
    for _ in range(3):
        with jax.transfer_guard_device_to_host("disallow"):  # but for `device_get`; not on a CPU
            logits_BV = session.feed([[int(token)] for token in tokens])
            assert isinstance(logits_BV, jax.Array) and logits_BV.shape == (2, VOCAB)
            tokens = sampler.draw(logits_BV)
    assert len(jax.tree.leaves(fetched)) == 4
    for leaf in jax.tree.leaves(fetched):
        assert leaf.shape == (2,) and leaf.dtype == jnp.int32


def test_the_program_gives_tokens_and_keeps_its_state() -> None:
    """Without a repetition penalty none of the program's results has the dim of the vocabulary."""
    rows = [SamplingOptions(temperature=0.9, top_k=5, top_p=0.9, min_p=0.1)] * 3
    filters = Filters(draws=True, top_k=True, top_p=True, min_p=True, penalty=False)
    arguments = (sampling.row_options(rows), sampling.RowState(jnp.zeros(3, jnp.int32), None))
    results = jax.eval_shape(
        lambda logits_BV: sampling.draw_tokens(filters, None, logits_BV, *arguments),
        jax.ShapeDtypeStruct((3, 1234), jnp.float32),
    )
    assert [leaf.shape for leaf in jax.tree.leaves(results)] == [(3,), (3,)]


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
    """Sorting 150,000 logits takes XLA's CPU back end about 36 ms, and the whole program less than
    10.
    """
    rows = [SamplingOptions(top_k=50, top_p=0.95, min_p=0.05, repetition_penalty=1.1)]
    occurred = jax.ShapeDtypeStruct((1, 150_000), bool)
    program = sampling.draw_program(jax.sharding.SingleDeviceSharding(jax.devices()[0])).lower(
        Filters(*[True] * 5),
        None,
        jax.ShapeDtypeStruct((1, 150_000), jnp.float32),
        sampling.row_options(rows),
        sampling.RowState(jnp.zeros(1, jnp.int32), occurred),
    )
    text = program.compile().as_text()
    assert "150000" in text and "sort(" not in text and "topk" not in text.lower()
