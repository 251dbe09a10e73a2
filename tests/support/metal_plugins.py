"""JAX as it is where a Metal plug-in is installed, as far as lowering goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.extend.backend import register_backend_factory

from moe_jax.profiling.portable import PluginTable, read_plugin_table
from moe_jax.runtime.metal import METAL_ON_CPU
from moe_jax.runtime.platform import standing_in
from tests.support import ROOT

TABLES = ROOT / "scripts" / "plugins"


@contextmanager
def plugin(release: str) -> Iterator[PluginTable]:
    """The table of a release such as `jax-mps-0.10.11`; JAX lowers for its platform meanwhile."""
    table = read_plugin_table(TABLES / f"{release}.json")
    register_backend_factory(table.platform, lambda: None, priority=-1000)
    before = jax.config.jax_use_shardy_partitioner  # type: ignore[attr-defined]
    jax.config.update("jax_use_shardy_partitioner", table.shardy)
    try:
        with standing_in(METAL_ON_CPU):
            yield table
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)
