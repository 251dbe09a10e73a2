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
from jax.experimental import multihost_utils

from moe_jax.errors import CorruptCheckpoint, UserError
from moe_jax.runtime import distributed

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
    """Lets other processes hear something that JSON can say, as `tell_processes` does."""
    distributed.tell_processes(what, json.dumps(value))


def hear(what: str, process: int) -> Any:
    """What a process told. Raises UserError naming the process where it is silent."""
    return json.loads(distributed.hear_process(what, process, LIMIT))
