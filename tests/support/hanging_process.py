"""A process whose step stands still: `python -m tests.support.hanging_process RUN_DIR SECONDS`."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from moe_jax.tracking.phases import Phases

with Phases(Path(sys.argv[1]), hang_timeout=float(sys.argv[2])) as phases:
    phases.enter("compile", 1)
    phases.enter("step", 7)
    threading.Event().wait(60)
