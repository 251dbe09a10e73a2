"""`python -m moe_jax`: the same as the `moe-jax` command."""

from __future__ import annotations

from moe_jax.cli.main import main

main()
