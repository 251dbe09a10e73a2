"""What libraries print unasked, kept off the terminal."""

from __future__ import annotations

import functools
import logging
import os
import sys
from pathlib import Path
from typing import Any

# What asyncio says of a loop that is used after its end.
CLOSED_LOOP = "Event loop is closed"


@functools.cache
def quiet_checkpoints() -> None:
    """For the rest of the process: hides what Orbax logs below a warning or with an error that it
    raises, and tensorstore's tracebacks about a save that has failed already.
    """
    logging.getLogger("absl").addFilter(
        lambda record: "orbax" not in record.pathname or _is_warning(record)
    )
    shown = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # When one write of a save has failed, tensorstore reports the rest of them to an event loop
        # that Orbax has closed: a traceback each, from a thread where nobody can catch it, while
        # the failure itself is raised.
        if str(unraisable.exc_value) != CLOSED_LOOP:
            shown(unraisable)

    sys.unraisablehook = hook


def quiet_compiler() -> None:
    """Hides what XLA logs, unless a GPU's errors must be seen or TF_CPP_MIN_LOG_LEVEL is set;
    before JAX is imported.

    Whenever XLA:CPU loads a kept program it logs an error of 2 kB: it takes two tuning preferences
    of the compiler for instructions that the processor lacks. What is really wrong it raises.
    """
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def quiet_transformers() -> None:
    """To be called before `transformers` is imported: that torch is not there is no news, as only
    its tokenizers are used.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING and not record.exc_info
