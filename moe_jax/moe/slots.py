"""Parameters of experts, which live in slots.

In a tree of parameters the experts of block j of stack i are arrays [repeats, P, ...];
`expert_layers` says which MoE layers, and so which rows of a table [L, P], its repeats are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.placement.table import EMPTY

Layers = dict[tuple[int, int], list[int]]


def expert_banks(tree: Any, layers: Layers) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
    """The experts' arrays of each block, to be replaced in place, and the table rows of their
    repeats.
    """
    for (stack, block), rows in layers.items():
        yield tree["stacks"][stack]["blocks"][block]["mlp"]["experts"], np.array(rows)


def take_slots(weights: jax.Array, source_RP: np.ndarray) -> jax.Array:
    """Rows of the second dim by index, for each index of the first; zeros for EMPTY. [R, N, ...] to
    [R, P, ...].
    """
    source = jnp.asarray(np.where(source_RP == EMPTY, weights.shape[1], source_RP))
    return jax.vmap(lambda w, s: w.at[s].get(mode="fill", fill_value=0))(weights, source)
