"""Time without what compiling takes: JAX's own events say when it traces, lowers or compiles."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from typing import Any

import jax

COMPILING = "/jax/core/compile/"
BACK_END = f"{COMPILING}backend_compile_duration"  # once for each program, read from a cache or not


class CompileClock:
    """Sums the time in which JAX traces, lowers or compiles; traces within traces count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Seconds since the clock was made."""
        self.programs: Counter[int] = Counter()
        """Programs that each thread has compiled, or read from where they are kept, since then."""
        self._spans: list[tuple[float, float]] = []  # apart from each other, in their order
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **details: Any) -> None:
        if not event.startswith(COMPILING):
            return
        self.programs[threading.get_ident()] += event == BACK_END
        end = time.perf_counter()
        start = end - duration_secs
        # An event is told at its end: those that lie within it have been told before.
        while self._spans and self._spans[-1][0] >= start:
            inner_start, inner_end = self._spans.pop()
            self.seconds -= inner_end - inner_start
        self._spans.append((start, end))
        self.seconds += duration_secs


@functools.cache
def compile_clock() -> CompileClock:
    """The clock of this process; it runs from the first call on."""
    return CompileClock()


class Stopwatch:
    """Measures a `with` block: `seconds` without compiling, and `compiling`."""

    def __enter__(self) -> Stopwatch:
        self._compiled, self._start = compile_clock().seconds, time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.compiling = compile_clock().seconds - self._compiled
        self.seconds = max(time.perf_counter() - self._start - self.compiling, 1e-9)
