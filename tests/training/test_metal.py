"""The training step for Metal, run on the CPU: the same losses and state as the CPU's own step."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.runtime.metal import METAL_ON_CPU
from moe_jax.runtime.platform import standing_in
from tests.inference.test_metal import LACKING
from tests.support.tiny_programs import make_batch, make_program

STEPS = 3
KINDS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "dropping": {"moe": {"dropless": False, "capacity_factor": 0.6, "dispatch": "pooled"}},
    "accumulating": {"accumulation": 2, "moe": {"aux_loss": 0.01, "first_dense": 1}},
}


def run(kind: str) -> tuple[list[float], Any, str]:
    """Losses of some steps, the state after them, and the step's program."""
    program = make_program(**KINDS[kind])
    state, batch, losses = program.init(0), program.shard(make_batch(0)), []
    lowered = program.train_step.lower(state, batch)
    step = lowered.compile()
    for _ in range(STEPS):
        state, stats = step(state, batch)
        losses.append(float(stats.loss))
    return losses, state.params, lowered.as_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_the_step_of_metal_is_the_normal_one(kind: str) -> None:
    losses, params, normal = run(kind)
    with standing_in(METAL_ON_CPU):
        found, after, text = run(kind)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for one, wanted in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, wanted, atol=2e-4)
    assert LACKING.search(text) is None
    assert LACKING.search(normal) is not None
    sorts = re.findall(r'"stablehlo.sort"\(([^)]*)\)', text)
    assert sorts and max(operands.count("%") for operands in sorts) == 2  # a key and its place
