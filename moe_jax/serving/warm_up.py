"""Running every program once, so that none is compiled while requests wait."""

from __future__ import annotations

import numpy as np

from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.inference.session import SHORTEST_PROMPT
from moe_jax.serving.device_state import DeviceState
from moe_jax.serving.request import Request
from moe_jax.serving.row_sampling import DRAW_KINDS


def warm_up(state: DeviceState) -> None:
    """Compiles what an engine runs. Nothing that a request sees changes: what is left in the slots
    is overwritten before anything reads it.
    """
    size, rows = state.size, state.size.max_batch
    request = Request((0,), 1, sampling=SamplingOptions(repetition_penalty=2.0))
    token_S, start_S, length_S = np.zeros((3, rows), np.int32)
    # Twice: the state that a first run leaves may lie on the devices in another way than it began.
    for _ in range(2):
        state.begin(0, request, DRAW_KINDS[-1])
        width = SHORTEST_PROMPT
        while width <= size.chunk:
            state.read_prompt([0] * width, 0)
            width *= 2
        if size.blocks:
            state.keep_block(0, 0)
            state.fetch_block(0, 0)
        state.move_to_slot(0, 1)
        state.decode(token_S, start_S, length_S)
        for kind in DRAW_KINDS:
            state.draw({0: kind}, token_S, {})
        state.top(token_S)
        state.expert_counts()
    state.forget_counts()
