"""What the processes of a job tell each other while they save or restore together.

value = by_all(lambda: read(my_share))      # raises on every process where it fails on one
tell("digests of save 3", {"a/b": "..."})   # from any thread
digests = hear("digests of save 3", 1)      # what process 1 told
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from moe_jax.errors import CorruptCheckpoint, UserError

T = TypeVar("T")

# How long a process waits for what another has to tell, in seconds. One that fails tells so, and
# the death of one ends all of them sooner: this is for one that stands still.
LIMIT = 600


def by_all(work: Callable[[], T]) -> T:
    """`work` on every process, each its own part of it; where it fails on some, every process
    raises what the first of those has to say. To be called by all, on their main threads.
    """
    error: Exception | None = None
    try:
        value = work()
    except Exception as failure:
        error = failure
    raise_together(error)
    return value


def raise_together(error: Exception | None) -> None:
    """Raises `error` or, if there is none here, that of the first process that has one."""
    if jax.process_count() > 1:
        told = b"" if error is None else f"{type(error).__name__} {error}".encode()
        sizes = multihost_utils.process_allgather(np.int32(len(told))).reshape(-1)
        if sizes.any():
            first = int(np.flatnonzero(sizes)[0])
            is_first = jax.process_index() == first
            padded = np.frombuffer((told if is_first else b"").ljust(sizes[first], b"\0"), np.uint8)
            heard = multihost_utils.broadcast_one_to_all(padded, is_source=is_first)
            name, _, sentence = np.asarray(heard).tobytes().decode().partition(" ")
            if not is_first:
                damaged = name == CorruptCheckpoint.__name__
                error = CorruptCheckpoint(sentence) if damaged else UserError(sentence)
    if error is not None:
        raise error


def tell(what: str, value: Any) -> None:
    """Lets other processes hear something that JSON can say. No two calls of a process may have the
    same `what`.
    """
    if jax.process_count() > 1:
        _client().key_value_set(_key(what, jax.process_index()), json.dumps(value))


def hear(what: str, process: int) -> Any:
    """What a process told. Raises UserError naming the process where it is silent."""
    try:
        text = _client().blocking_key_value_get(_key(what, process), LIMIT * 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise UserError(
            f"process {process} has not told the {what} within {LIMIT} s: look at its log."
        ) from error
    return json.loads(text)


def _key(what: str, process: int) -> str:
    return f"moe_jax/{what}/{process}"


def _client() -> Any:
    """The store of texts that the processes of a job have in common."""
    return distributed.global_state.client
