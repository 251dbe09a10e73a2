"""Perplexity: every token but the first counts once, whatever the window; and texts that cannot be
scored.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from moe_jax.config.schema import DataConfig
from moe_jax.data.sources import read_documents
from moe_jax.errors import UserError
from moe_jax.generation.evaluate import evaluate, read_text
from tests.support.fake_model import Loaded, fake_engine

TEXT = "caf\u00e9 and so on"  # 14 characters, 15 bytes


@pytest.fixture
def scored() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return []


@pytest.fixture
def loaded(scored: list) -> Loaded:
    """A model to which a token of id n costs n thousandths of a nat."""

    def score(
        tokens: np.ndarray, targets: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        scored.append((tokens, targets, mask))
        return np.float32((targets * mask).sum() / 1000), np.float32(mask.sum())

    return Loaded(lambda tokens: 0, context=64, engine=fake_engine(score))


@pytest.mark.parametrize("window", [None, 64, 14, 5, 1])
def test_every_token_but_the_first_counts_once(
    window: int | None, loaded: Loaded, scored: list
) -> None:
    found = evaluate(loaded, TEXT, window)
    data = TEXT.encode()
    nats = sum(data[1:]) / 1000
    assert (found.tokens, found.bytes) == (14, 14)
    assert found.nats_per_token == pytest.approx(nats / 14, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / 14), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / 14 / math.log(2), rel=1e-5)
    assert found.window == min(window or 64, 14)
    assert len({tokens.shape for tokens, _, _ in scored}) == 1  # one shape, compiled once
    read = np.concatenate([tokens[mask > 0] for tokens, _, mask in scored])
    assert bytes(read.astype(np.uint8)) == data[:-1]


def test_a_start_token_makes_every_byte_count(loaded: Loaded, scored: list) -> None:
    loaded.tokenizer = dataclasses.replace(loaded.tokenizer, start_ids=(256,))
    found = evaluate(loaded, TEXT)
    assert (found.tokens, found.bytes) == (15, 15)
    assert scored[0][0][0, 0] == 256
    assert evaluate(loaded, TEXT, special=False).tokens == 14


def test_a_token_that_the_model_has_no_row_for_is_refused(loaded: Loaded) -> None:
    loaded.tokenizer = dataclasses.replace(loaded.tokenizer, start_ids=(300,))
    with pytest.raises(UserError, match="has token 300 and the model a vocabulary of 264"):
        evaluate(loaded, TEXT)


def test_a_text_keeps_its_line_ends_and_loses_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\xef\xbb\xbf")
    assert read_text(tmp_path / "a.txt") == "one\r\ntwo\n\ufeff"
    assert list(read_documents(DataConfig(source=str(tmp_path)))) == ["one\r\ntwo\n\ufeff"]


def test_a_loss_that_is_not_finite_is_refused(loaded: Loaded) -> None:
    loaded.engine.score = lambda *arguments: (np.float32(np.nan), np.float32(5))
    with pytest.raises(UserError, match="loss is not finite"):
        evaluate(loaded, TEXT)


def test_mistakes(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"--window 65 exceeds the model's context of 64 tokens: lower it, or raise",
    ):
        evaluate(loaded, TEXT, 65)
    with pytest.raises(UserError, match=r"The text has 1 tokens: give one of at least two."):
        evaluate(loaded, "x")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    for name, words in (
        ("latin.txt", r"not UTF-8 \(byte 3\)"),
        ("empty.txt", "is empty"),
        ("none.txt", "No such file"),
        ("", "directory"),
    ):
        with pytest.raises(UserError, match=f"--text .*{words}") as error:
            read_text(tmp_path / name)
        assert "\n" not in str(error.value)
