"""A process that holds the lock of a run directory until it is killed.

python -m tests.support.lock_holder RUN_DIR
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from moe_jax.tracking.run_lock import locked


def run() -> None:
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        signal.pause()


if __name__ == "__main__":
    run()
