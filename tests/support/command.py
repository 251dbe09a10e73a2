"""The command as a test calls it."""

from __future__ import annotations

import pytest

from moe_jax.cli import main


def call(*arguments: str) -> int:
    """Exit code of `moe-jax ARGUMENTS`."""
    with pytest.raises(SystemExit) as caught:
        main.main([str(argument) for argument in arguments])
    return caught.value.code
