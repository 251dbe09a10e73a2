"""Sampling: what is drawn, how text is put together from tokens, and that a run says the same wherever it was trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_run import copy_until, finished, run, shared_program

from moe_jax.generate import generate, generate_run, open_run, sample
from moe_jax.tokenizer import Tokenizer, load_tokenizer

GREEDY = {"max_tokens": 12, "temperature": 0.0, "top_k": None, "top_p": None, "seed": 0, "step": None, "fallback": False}
BIAS = "moe.bias_rate=0.01"


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_jax.generate.Program", shared_program)


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return finished(folder, BIAS)


def draws(logits: list[float], count: int = 4000, **options: object) -> np.ndarray:
    """How often each token comes, as a share."""
    rng = np.random.default_rng(0)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    drawn = [sample(np.array(logits, np.float32), rng=rng, **settings) for _ in range(count)]
    return np.bincount(drawn, minlength=len(logits)) / count


# Likelihoods 1/2, 1/4, 1/8, 1/8.
LOGITS = [float(np.log(share)) for share in (0.125, 0.5, 0.125, 0.25)]


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1e-9}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 0.3}, {"temperature": 0.0, "top_k": 3}]
)
def test_the_likeliest_alone(options: dict[str, float]) -> None:
    np.testing.assert_array_equal(draws(LOGITS, 50, **options), [0, 1, 0, 0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 99}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_p": 0.5}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.75}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8}, [1 / 7, 4 / 7, 0, 2 / 7]),  # of two equals the first
        ({"top_p": 1.0}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # of the two that are left the first has 2/3
    ],
)
def test_shares_follow_the_distribution(options: dict[str, float], expected: list[float]) -> None:
    np.testing.assert_allclose(draws(LOGITS, **options), expected, atol=0.025)
    assert ((draws(LOGITS, **options) > 0) == (np.array(expected) > 0)).all()


def test_large_logits_do_not_overflow() -> None:
    np.testing.assert_allclose(draws([3e38, 3e38, -3e38], 2000), [0.5, 0.5, 0], atol=0.05)


class Scripted:
    """A model that says given tokens, whatever it reads, and notes what it was given."""

    def __init__(self, tokens: list[int], vocabulary: int = 264):
        self.tokens, self.vocabulary, self.read = tokens, vocabulary, []

    def prefill(self, tokens: list[int]) -> tuple[int, np.ndarray]:
        self.read = list(tokens)
        return 0, self._logits(0)

    def decode(self, place: int, token: int) -> tuple[int, np.ndarray]:
        self.read.append(token)
        return place + 1, self._logits(place + 1)

    def _logits(self, place: int) -> np.ndarray:
        logits = np.zeros(self.vocabulary, np.float32)
        logits[self.tokens[place]] = 9.0
        return logits


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


def say(tokens: list[int], tokenizer: Tokenizer, max_tokens: int = 99) -> list[str]:
    return list(generate(Scripted(tokens), tokenizer, "go", max_tokens=max_tokens, temperature=0.0))


def test_a_character_of_several_tokens_comes_out_whole(tokenizer: Tokenizer) -> None:
    text = "a\u00e9\u4e13\U0001f600!"
    pieces = say([*text.encode(), tokenizer.eos_id], tokenizer)
    assert [piece for piece in pieces if piece] == list(text)


def test_an_unfinished_character_at_the_end_is_not_lost(tokenizer: Tokenizer) -> None:
    assert "".join(say(list("a\u4e13".encode()), tokenizer, max_tokens=3)) == "a\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_character_do_not_stop_the_text(tokenizer: Tokenizer) -> None:
    assert "".join(say([*b"a\xffb", tokenizer.eos_id], tokenizer)) == "a\N{REPLACEMENT CHARACTER}b"


def test_it_stops_at_the_end_of_the_document_or_at_the_limit(tokenizer: Tokenizer) -> None:
    assert "".join(say([*b"ab", tokenizer.eos_id, *b"cd"], tokenizer)) == "ab"
    assert "".join(say(list(b"abcd"), tokenizer, max_tokens=3)) == "abc"
    assert "".join(say([tokenizer.eos_id], tokenizer)) == ""


def test_padding_of_the_vocabulary_is_never_drawn(tokenizer: Tokenizer) -> None:
    """Ids 257 to 263 stand for no text, however likely the model finds them."""
    model = Scripted([260] * 40)
    for piece in generate(model, tokenizer, "go", max_tokens=40, temperature=1.0):
        assert isinstance(piece, str)
    assert max(model.read) <= 256


def test_the_last_token_costs_no_further_pass(tokenizer: Tokenizer) -> None:
    model = Scripted(list(b"abc"))  # a fourth would be out of range
    assert "".join(generate(model, tokenizer, "go", max_tokens=3, temperature=0.0)) == "abc"
    assert bytes(model.read) == b"goab"


# A run's model.


def text(directory: Path, prompt: str = "the router ", **options: object) -> str:
    return "".join(generate_run(directory, prompt, **{**GREEDY, **options}))


def test_the_same_seed_gives_the_same_text(base: Path) -> None:
    assert text(base) == text(base, seed=5)  # greedy has no seed
    options = {"temperature": 1.0, "max_tokens": 30}
    assert text(base, seed=5, **options) == text(base, seed=5, **options)
    assert text(base, seed=5, **options) != text(base, seed=6, **options)
    assert text(base, step=3, seed=5, **options) != text(base, seed=5, **options)


def test_a_run_says_the_same_wherever_it_was_trained(base: Path, folder: Path, tmp_path: Path) -> None:
    """The same checkpoint after a move to another mesh, with other slots, and no step in between."""
    moved = copy_until(base, tmp_path / "moved", 6)
    mesh = ("mesh.data=1", "mesh.expert=8", "placement.redundant_slots=1")
    options = {"temperature": 1.0, "max_tokens": 30}
    sampler, _ = open_run(base)
    run(folder, moved, BIAS, *mesh, resume=True)
    other, _ = open_run(moved)
    prompt = list(b"the router ")
    np.testing.assert_array_equal(sampler.prefill(prompt)[1], other.prefill(prompt)[1])
    assert text(moved, **options) == text(base, **options)


def test_only_the_last_tokens_of_a_long_prompt_are_read(base: Path) -> None:
    sampler, tokenizer = open_run(base)
    assert sampler.context == 32
    tail = "expert of the loaded gate, load "
    assert len(tail) == 32
    short, long = (sampler.prefill(tokenizer.encode(prompt))[1] for prompt in (tail, "something else " * 9 + tail))
    np.testing.assert_array_equal(short, long)
    assert text(base, "word " * 50) != ""


def test_decode_after_prefill_is_prefill_of_all(base: Path) -> None:
    sampler, _ = open_run(base)
    tokens = list(b"the gate and the load")
    cache, logits = sampler.prefill(tokens[:4])
    for token in tokens[4:]:
        cache, logits = sampler.decode(cache, token)
    np.testing.assert_array_equal(logits, sampler.prefill(tokens)[1])
    assert logits.shape == (264,) and logits.dtype == np.float32 and np.isfinite(logits).all()


def test_what_comes_after_a_token_does_not_change_its_logits(base: Path) -> None:
    """Padding to one of a few lengths must not be seen."""
    sampler, _ = open_run(base)
    longer = dataclasses.replace(sampler, context=96)
    tokens = list(b"the gate and the load")
    np.testing.assert_allclose(longer.prefill(tokens)[1], sampler.prefill(tokens)[1], rtol=1e-5, atol=1e-5)
