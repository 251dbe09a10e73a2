"""Running every program once, so that none is compiled while requests wait."""

from __future__ import annotations

import numpy as np

from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.inference.session import SHORTEST_PROMPT
from moe_jax.runtime.platform import default_platform
from moe_jax.serving.device_state import DeviceState
from moe_jax.serving.request import Request
from moe_jax.serving.row_sampling import DRAW_KINDS

FEW_SLOTS = (2, 8)  # over which a step may run on a CPU, if there are more


def warm_up(state: DeviceState) -> tuple[int, ...]:
    """Compiles what an engine runs; over how many slots a step may run, the first ones, ascending.

    On a CPU a step takes longer the more rows there are, so it may run over a few alone, if that
    gives the same bits as running over all: which product XLA chooses depends on the rows, so it is
    tried. Nothing that a request sees changes: what is left in the slots is overwritten before
    anything reads it.
    """
    size = state.size
    few = FEW_SLOTS if default_platform().simulated else ()
    widths = (*(slots for slots in few if slots < size.max_batch), size.max_batch)
    request = Request((0,), 1, sampling=SamplingOptions(repetition_penalty=2.0))
    # Twice: the state that a first run leaves may lie on the devices in another way than it began.
    for _ in range(2):
        state.begin(0, request, DRAW_KINDS[-1])
        for slot in range(min(2, size.max_batch)):
            for windowed in (False, True):
                state.place(slot, windowed, 0, slot + 1)
        width = SHORTEST_PROMPT
        while width <= size.chunk:
            state.read_prompt(0, [0] * width, 0)
            width *= 2
        if state.move_budget:
            assert state.placement is not None
            state.move_experts(state.placement.physical_to_logical)
        logits = {slots: _run_steps(state, slots) for slots in widths}
        state.expert_counts()
    for slot in range(min(2, size.max_batch)):
        state.vacate(slot)
    state.forget_counts()
    every = logits[size.max_batch]
    return tuple(slots for slots in widths if np.array_equal(logits[slots], every))


def _run_steps(state: DeviceState, slots: int) -> list[np.ndarray]:
    """Some steps over the first slots, and the logits of the first two after each."""
    zero_S = np.zeros(slots, np.int32)
    for kind in DRAW_KINDS:
        state.draw({0: kind}, zero_S, {})
    state.top(zero_S)
    found = []
    for step in range(4):
        token_S, length_S = zero_S.copy(), zero_S.copy()
        token_S[:2], length_S[:2] = (step, step + 1)[: len(token_S)], 1
        state.decode(token_S % state.sampler.num_ids, zero_S + step, length_S)
        found += [state.row_logits(row) for row in range(min(2, state.size.max_batch))]
    return found
