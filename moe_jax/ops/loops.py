"""Loops whose turns give results of their own.

A plug-in may give back what a loop has stacked with parts of it overwritten
(`Platform.stacks_in_loops`). There the turns are written out one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from moe_jax.runtime.platform import default_platform


def scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """`lax.scan`."""
    if default_platform().stacks_in_loops:
        return lax.scan(body, carry, inputs)
    turns = jax.tree.leaves(inputs)[0].shape[0]
    if turns == 1:  # which `lax.scan` would leave a loop
        carry, one = body(carry, jax.tree.map(lambda a: a[0], inputs))
        return carry, jax.tree.map(lambda a: a[None], one)
    return lax.scan(body, carry, inputs, unroll=turns)


def map_over(body: Callable[[Any], Any], inputs: Any) -> Any:
    """`lax.map`."""
    return scan(lambda _, one: (None, body(one)), None, inputs)[1]
