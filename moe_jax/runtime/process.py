"""What the `moe-jax` command sets for its whole process, in one place, before anything imports JAX.

    prepare_process()

Later is too late: XLA reads its log level when it is loaded.
"""

from __future__ import annotations

import time

from moe_jax.runtime.quiet import quiet_checkpoints, quiet_compiler
from moe_jax.runtime.terminal import print_any_character

_began: float | None = None


def take_beginning() -> float | None:
    """Wall time at which the command began, once; None where no command did since."""
    global _began
    taken, _began = _began, None
    return taken


def prepare_process() -> None:
    """What libraries log, characters that stdout cannot show, and when the command began."""
    global _began
    _began = time.time()
    quiet_compiler()
    quiet_checkpoints()
    print_any_character()
