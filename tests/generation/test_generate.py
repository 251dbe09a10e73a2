"""Texts: how they end, and what is read for them and what is not, with a model that says what it is
told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.generation.generate import Reader, generate
from moe_jax.generation.sampling import Sampler
from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.generation.stats import GenerationStats
from tests.support.fake_model import END, Loaded, script

GREEDY_OPTIONS = SamplingOptions(temperature=0.0)


def say(
    loaded: Loaded,
    prompt: bytes = b"go",
    max_tokens: int = 99,
    options: SamplingOptions = GREEDY_OPTIONS,
    **more: Any,
) -> str:
    reader = Reader(loaded.session())
    sampler = Sampler([options], loaded.tokenizer.num_ids)
    return "".join(generate(loaded, reader, list(prompt), sampler, max_tokens=max_tokens, **more))


def saying(tokens: Sequence[int], context: int = 200) -> Loaded:
    return Loaded(script(tokens, prompt=2), context)


def test_it_ends_at_the_end_of_the_document_or_at_a_limit() -> None:
    for tokens, options, text, ended in (
        ([*b"ab", END, *b"cd"], {}, "ab", "end"),
        (b"abcd", {"max_tokens": 3}, "abc", "tokens"),
        ([END], {}, "", "end"),
        (b"a b. c", {"stop": [". "]}, "a b", "stop"),
    ):
        figures = GenerationStats()
        assert say(saying(tokens), figures=figures, **options) == text
        assert figures.ended == ended
    other = saying(list(b"abc"))
    other.eos_ids = (END, ord("c"))
    assert say(other) == "ab"


def test_the_last_token_costs_no_further_pass() -> None:
    loaded, figures = saying(b"abc"), GenerationStats()  # a fourth would be out of range
    assert say(loaded, max_tokens=3, figures=figures) == "abc"
    assert loaded.feeds == [[*b"go"], [*b"a"], [*b"b"]]
    assert (figures.prompt_tokens, figures.tokens, figures.steps, figures.reused_tokens) == (
        2,
        3,
        2,
        0,
    )
    assert figures.prompt_rate > 0 and figures.rate > 0


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    """Ids 257 to 263 stand for no text, however likely the model finds them."""
    loaded = saying([260] * 40)
    say(loaded, max_tokens=40, options=SamplingOptions(temperature=1.0))
    assert max(token for feed in loaded.feeds for token in feed) <= END


def test_repetition_is_counted_from_the_prompt_on() -> None:
    say_o = Loaded(lambda tokens: ord("o"))  # a logit of 9, all others 0
    assert say(say_o, max_tokens=3) == "ooo"
    loaded = Loaded(lambda tokens: ord("o"))
    assert (
        say(
            loaded, b"g", max_tokens=20, options=SamplingOptions(1.0, repetition_penalty=1e30)
        ).count("o")
        < 5
    )


def test_an_interrupted_text_says_so() -> None:
    figures = GenerationStats()
    loaded = saying(b"abc")
    pieces = generate(
        loaded,
        Reader(loaded.session()),
        [1, 2],
        Sampler([GREEDY_OPTIONS]),
        max_tokens=9,
        figures=figures,
    )
    assert next(pieces) == "a"
    pieces.close()
    assert figures.ended == "interrupted"


def test_prompts_that_cannot_be() -> None:
    with pytest.raises(UserError, match="--prompt is empty"):
        say(saying(b"a"), b"")
    with pytest.raises(
        UserError, match=r"The prompt has 5 tokens and the model's context 4: shorten it, or raise"
    ):
        say(saying(b"a", context=4), b"12345")


def test_a_full_context_ends_the_text_or_slides() -> None:
    figures = GenerationStats()
    assert (
        say(saying(b"abcdefgh", context=6), figures=figures) == "abcde"
        and figures.ended == "context"
    )

    def count_up(tokens: Sequence[int]) -> int:
        return tokens[-1] + 1

    loaded = Loaded(count_up, context=6)
    assert say(loaded, b"12345678", max_tokens=7, slide=True) == "9:;<=>?"
    # The prompt's end; then the last half, and on from there until it is full again.
    assert [bytes(feed) for feed in loaded.feeds] == [
        b"345678",
        b"789",
        b":",
        b";",
        b"<",
        b";<=",
        b">",
    ]


def test_a_reader_reads_what_it_does_not_hold() -> None:
    loaded = Loaded(lambda tokens: tokens[-1])
    reader = Reader(loaded.session())
    for tokens, kept, fed in (
        (b"abcd", 0, b"abcd"),
        (b"abcdef", 4, b"ef"),
        (b"abxy", 2, b"xy"),
        (b"abxy", 3, b"y"),  # all is there; reading one token gives the logits
        (b"ab", 1, b"b"),
        (b"q", 0, b"q"),
    ):
        logits, found = reader.read(list(tokens))
        assert (found, bytes(loaded.feeds[-1]), int(np.argmax(logits))) == (kept, fed, tokens[-1])
    assert int(np.argmax(reader.append(7))) == 7 and reader.tokens == [ord("q"), 7]
