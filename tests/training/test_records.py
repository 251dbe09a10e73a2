"""What a run says of its decisions in a line."""

from __future__ import annotations

import pytest

from moe_jax.training.records import placement_sentence


@pytest.mark.parametrize(
    ("after", "words"),
    [(1.8, "before 2.00 (10% less, predicted 20% less)"), (2.5, "(25% more, predicted 20% less)")],
)
def test_a_move_that_made_it_worse_says_so(after: float, words: str) -> None:
    event = {
        "step": 8,
        "event": "placement_realised",
        "of_step": 4,
        "max_over_mean_before": 2.0,
        "max_over_mean_after": after,
        "realised_gain": 1 - after / 2,
        "predicted_gain": 0.2,
    }
    sentence = placement_sentence(event)
    assert sentence.endswith(words) and f"has {after:.2f} times the mean load" in sentence
