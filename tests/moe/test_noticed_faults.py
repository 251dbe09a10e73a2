"""What other tests let pass: faults that scripts/mutate.py planted and that changed nothing they
look at.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_jax.config.model import MoEConfig
from tests.moe.test_router import route

pytestmark = pytest.mark.usefixtures("strict_promotion")


def test_input_noise_multiplies() -> None:
    """So an input of zeros stays what it is, and each logit within its own bounds."""
    keys = jax.random.split(jax.random.key(0), 1)
    config = MoEConfig(num_experts=2, top_k=2, input_noise=0.25, normalize="before")
    routing, _ = route(config, np.zeros((1, 50, 2)), keys=keys)
    np.testing.assert_array_equal(routing.weight_TK, 0.5)
    routing, _ = route(config, np.tile([0.0, np.log(2)], (1, 400, 1)), keys=keys)
    logits = np.log(routing.weight_TK[:, 0] / routing.weight_TK[:, 1]) / np.log(2)
    assert (routing.expert_TK == np.array([1, 0])).all()
    assert 0.75 <= logits.min() < 0.77 and 1.23 < logits.max() <= 1.25 + 1e-6


def test_dropout_draws_by_a_key_of_its_own() -> None:
    """Not by the one of the input noise: what is dropped would then follow the noise."""
    config = MoEConfig(num_experts=8, top_k=1, expert_dropout=0.5)
    keys = jax.random.split(jax.random.key(1), 16)
    routing, _ = route(config, np.tile(np.arange(8.0)[::-1], (16, 1, 1)), keys=keys)
    own = jax.vmap(lambda key: jax.random.split(key, 2)[1])(keys)
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (8,)))(own)
    first_left = np.argmin(np.asarray(dropped), axis=1)  # the likeliest that is not dropped
    np.testing.assert_array_equal(routing.expert_TK.ravel(), first_left)
