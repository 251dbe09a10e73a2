"""What the `moe-jax` command sets for its whole process, in one place, before anything imports JAX.

    prepare_process()

Later is too late: XLA reads its log level when it is loaded.
"""

from __future__ import annotations

from moe_jax.runtime.quiet import quiet_checkpoints, quiet_compiler
from moe_jax.runtime.terminal import print_any_character


def prepare_process() -> None:
    """What libraries log, and characters that stdout cannot show."""
    quiet_compiler()
    quiet_checkpoints()
    print_any_character()
