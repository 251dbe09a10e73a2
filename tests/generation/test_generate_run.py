"""Text from a run's checkpoint: the same wherever it was trained, and longer than its context."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_jax.generation.generate import generate_run
from moe_jax.inference import load
from tests.support.tiny_run import copy_until, finished, run

GREEDY = {
    "max_tokens": 12,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
    "seed": 0,
    "step": None,
    "fallback": False,
}
BIAS = "moe.bias_rate=0.01"


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return finished(folder, BIAS)


def text(directory: Path, prompt: str = "the router ", **options: object) -> str:
    return "".join(generate_run(directory, prompt, **{**GREEDY, **options}))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text(base: Path) -> None:
    assert text(base) == text(base, seed=5)  # greedy has no seed
    options = {"temperature": 1.0, "max_tokens": 30}
    assert text(base, seed=5, **options) == text(base, seed=5, **options)
    assert text(base, seed=5, **options) != text(base, seed=6, **options)
    assert text(base, step=3, seed=5, **options) != text(base, seed=5, **options)


@pytest.mark.slow
def test_a_run_says_the_same_wherever_it_was_trained(
    base: Path, folder: Path, tmp_path: Path
) -> None:
    """The same checkpoint after a move to another mesh, with other slots, and no step in
    between.
    """
    moved = copy_until(base, tmp_path / "moved", 6)
    mesh = ("mesh.data=1", "mesh.expert=8", "placement.redundant_slots=1")
    options = {"temperature": 1.0, "max_tokens": 30}
    run(folder, moved, BIAS, *mesh, resume=True)
    np.testing.assert_array_equal(logits(base, b"the router "), logits(moved, b"the router "))
    assert text(moved, **options) == text(base, **options)


def logits(run_dir: Path, tokens: bytes) -> np.ndarray:
    """After all of `tokens`, read at once."""
    loaded = load.open_model(run_dir)
    return loaded.session().logits([list(tokens)])[0]


def test_a_runs_context_is_no_limit_of_its_text(base: Path) -> None:
    assert load.open_model(base).context == 32
    tail = "expert of the loaded gate, load "
    assert len(tail) == 32
    assert (
        text(base, tail, max_tokens=40)
        == text(base, "something else " * 9 + tail, max_tokens=40)
        != ""
    )


@pytest.mark.slow
def test_reading_token_by_token_is_reading_at_once(base: Path) -> None:
    session = load.open_model(base).session()
    tokens = b"the gate and the load"
    last = session.logits([list(tokens[:4])])
    for token in tokens[4:]:
        last = session.logits([[token]])
    np.testing.assert_allclose(last[0], logits(base, tokens), rtol=1e-4, atol=1e-5)
    assert last.shape == (1, 264) and last.dtype == np.float32 and np.isfinite(last).all()
