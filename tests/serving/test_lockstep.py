"""Calls that several processes make alike."""

from __future__ import annotations

import numpy as np

from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.serving import lockstep
from moe_jax.serving.request import Request
from moe_jax.serving.row_sampling import DrawKind


def test_what_is_told_is_what_was_said() -> None:
    sampling = SamplingOptions(0.5, top_k=3, seed=2**64 - 1)
    request = Request((1, 2), 3, 1, sampling, 0.1, 0.2, {5: -1.5}, (7,), True, 4)
    mask = np.arange(9) % 2 == 0
    arguments = (
        3,
        request,
        DrawKind(True, False, True),
        {2: DrawKind(False, False, False)},
        {1: mask},
    )
    name, told = lockstep.call_of(lockstep.call_text("begin", arguments))
    assert name == "begin" and told[:4] == list(arguments[:4])
    assert isinstance(told[2], DrawKind) and isinstance(told[3][2], DrawKind)
    assert told[4][1].dtype == bool and told[4][1].tolist() == mask.tolist()
