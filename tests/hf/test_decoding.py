"""Prefill and cached decoding, against the greedy texts and padded batches of transformers: see
cases.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax import hf
from moe_jax.config.schema import MeshConfig
from moe_jax.inference.engine import ResidentEngine
from moe_jax.inference.read_weights import read_params, serving_tables
from moe_jax.models.batch import NewTokens
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous
from tests.support import hf_cases as cases
from tests.support.hf_cases import assert_same
from tests.support.slow import slow_unless

BUCKET = 24  # places of a prefill
ROOM = 76  # places of a row's cache


class Reader:
    """Rows of text on one device, all tests with as many so that each program is compiled once."""

    def __init__(self, folder: Path):
        checkpoint = hf.open_checkpoint(folder)
        placement = contiguous(
            count_moe_layers(checkpoint.model, checkpoint.moe), checkpoint.moe.num_experts, 1
        )
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        plan = ServingPlan(
            checkpoint.model, checkpoint.moe, mesh, placement, vocab_size=checkpoint.vocab_size
        )
        self.engine = ResidentEngine(
            plan, read_params(plan, checkpoint.leaf), serving_tables(plan, checkpoint.bias_LE())
        )

    def prefill(self, rows: list[np.ndarray]) -> tuple[np.ndarray, Any]:
        """(f32 logits [B, V] after each row, cache)."""
        tokens = np.zeros((len(rows), BUCKET), np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
        new = NewTokens(
            tokens, np.zeros(len(rows), np.int32), np.array([len(row) for row in rows], np.int32)
        )
        logits, cache = self.engine.prefill(self.engine.layout.new(len(rows), ROOM), new)
        return np.asarray(logits), cache

    def decode(self, cache: Any, tokens_B: np.ndarray, start: int) -> tuple[np.ndarray, Any]:
        """(f32 logits [B, V], cache) after one more token of each row, all of which are `start`
        long.
        """
        rows = len(tokens_B)
        new = NewTokens(
            tokens_B[:, None].astype(np.int32),
            np.full(rows, start, np.int32),
            np.ones(rows, np.int32),
        )
        logits, cache = self.engine.decode(cache, new)
        return np.asarray(logits), cache


# The others differ in what tests/hf/test_logits.py compares.
FIRST_OF_FAMILY = set({cases.family(case): case for case in reversed(cases.CASES)}.values())


@pytest.fixture(scope="module", params=slow_unless(FIRST_OF_FAMILY.__contains__, cases.CASES))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Reader, dict[str, np.ndarray]]:
    return Reader(
        cases.build(request.param, tmp_path_factory.mktemp(request.param))
    ), cases.expected(request.param)


def test_prefill_of_rows_of_different_lengths(case: tuple[Reader, dict[str, np.ndarray]]) -> None:
    reader, wanted = case
    found, _ = reader.prefill(
        [row[:length] for row, length in zip(wanted["tokens"], wanted["lengths"], strict=True)]
    )
    assert_same(found, wanted["left"])
    assert_same(found, wanted["right"])


def test_prefill_of_all_beginnings(case: tuple[Reader, dict[str, np.ndarray]]) -> None:
    """Logits after each token of one row, and after all tokens of each. Dynamic rotary scaling
    depends on what follows a token.
    """
    reader, wanted = case
    rows, length = wanted["tokens"].shape
    assert_same(reader.prefill(list(wanted["tokens"]))[0], wanted["last"])
    if reader.engine.plan.model.rope.scaling != "dynamic":
        for ends in np.arange(1, length + 1).reshape(-1, rows):
            assert_same(
                reader.prefill([wanted["tokens"][0, :end] for end in ends])[0],
                wanted["logits"][ends - 1],
            )


def test_greedy_text(case: tuple[Reader, dict[str, np.ndarray]]) -> None:
    """In all rows at once. With dynamic rotary scaling keys stay in the cache as they were rotated
    at first, as in transformers.
    """
    reader, wanted = case
    start, count, rows = len(wanted["prompt"]), len(wanted["greedy"]), len(wanted["tokens"])
    logits, cache = reader.prefill([wanted["prompt"]] * rows)
    written = [logits.argmax(-1)]
    while len(written) < count:
        logits, cache = reader.decode(cache, written[-1], start + len(written) - 1)
        written.append(logits.argmax(-1))
    np.testing.assert_array_equal(np.stack(written, axis=1), np.tile(wanted["greedy"], (rows, 1)))
