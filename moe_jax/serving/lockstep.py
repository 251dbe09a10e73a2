"""Several processes over one mesh: the first one decides, and all make the same calls.

    state = leading(DeviceState(loaded, size))     # process 0: its calls are told to the others
    follow(DeviceState(loaded, size))              # they make them, until `dismiss`

What a call needs are values of the host alone, so telling them is enough. They travel as JSON
through the coordination service of JAX.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
from typing import Any

import numpy as np

from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.runtime.distributed import hear_process, process_count, tell_processes
from moe_jax.serving.device_state import DeviceState
from moe_jax.serving.request import Request
from moe_jax.serving.row_sampling import DrawKind

CALLS = frozenset(
    name
    for name in vars(DeviceState)
    if not name.startswith("_") and callable(vars(DeviceState)[name])
)
END = "end"
KEPT_CALLS = 1000  # calls that a follower may be behind; in truth it is a step behind at most


class Leader:
    """A `DeviceState` whose calls are told to the other processes before they are made here."""

    def __init__(self, state: DeviceState):
        self._state, self._count = state, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._state, name)
        if name not in CALLS:
            return found

        def call(*arguments: Any) -> Any:
            self._tell(call_text(name, arguments))
            return found(*arguments)

        return call

    def end(self) -> None:
        """No call follows."""
        self._tell(call_text(END, ()))

    def _tell(self, text: str) -> None:
        old = self._count - KEPT_CALLS
        tell_processes(f"call {self._count}", text, forget=f"call {old}" if old >= 0 else None)
        self._count += 1


def leading(state: DeviceState) -> Any:
    """The state as process 0 uses it: itself where it is alone."""
    return Leader(state) if process_count() > 1 else state


def dismiss(state: Any) -> None:
    """Lets the followers go."""
    if isinstance(state, Leader):
        state.end()


def follow(state: DeviceState) -> None:
    """Makes the calls of process 0 until it dismisses this one. What JAX raises where process 0 has
    gone passes.
    """
    for count in itertools.count():
        name, arguments = call_of(hear_process(f"call {count}", 0, 1e6))
        if name == END:
            return
        assert name in CALLS, name
        getattr(state, name)(*arguments)


def call_text(name: str, arguments: tuple[Any, ...]) -> str:
    """A call, as `call_of` reads it. Of a request its token filter stays behind."""
    return json.dumps([name, [_plain(value) for value in arguments]])


def call_of(text: str) -> tuple[str, list[Any]]:
    """The name and the arguments of a call."""
    name, arguments = json.loads(text)
    return name, [_value(plain) for plain in arguments]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = base64.b64encode(value.tobytes()).decode()
        return {"array": data, "dtype": str(value.dtype), "shape": value.shape}
    if isinstance(value, Request):
        fields = dataclasses.asdict(dataclasses.replace(value, token_filter=None))
        return {"request": fields | {"logit_bias": list(value.logit_bias.items())}}
    if isinstance(value, DrawKind):
        return {"kind": value}
    if isinstance(value, dict):
        return {"dict": [[key, _plain(part)] for key, part in value.items()]}
    return value


def _value(plain: Any) -> Any:
    match plain:
        case {"array": data, "dtype": dtype, "shape": shape}:
            return np.frombuffer(base64.b64decode(data), dtype).reshape(shape)
        case {"request": fields}:
            changed = {
                "prompt": tuple(fields["prompt"]),
                "sampling": SamplingOptions(**fields["sampling"]),
                "logit_bias": dict(fields["logit_bias"]),
                "stop_token_ids": tuple(fields["stop_token_ids"]),
            }
            return Request(**fields | changed)
        case {"kind": parts}:
            return DrawKind(*parts)
        case {"dict": items}:
            return {key: _value(part) for key, part in items}
    return plain
