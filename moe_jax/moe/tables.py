"""A placement as the arrays that routing takes: data, so that a change of placement compiles
nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.placement.table import Placement
from moe_jax.utils.annotations import Array, Float, Int


class LayerTables(NamedTuple):
    """What routing needs in addition to weights, for one layer or stacked over layers."""

    # for the tokens of each host: slots by expert, those on the host first, empty ones last
    slots_NP: Int[Array, "... N P"]
    start_E: Int[Array, "... E"]  # where each expert's slots begin
    # how many of them the host's tokens use: those on the host, or all where it has none
    replicas_NE: Int[Array, "... N E"]
    bias_E: Float[Array, "... E"]  # balance bias


def make_tables(placement: Placement, hosts: int = 1) -> tuple[LayerTables, jax.Array]:
    """A placement as the arrays that a step takes, with a zero bias, and the expert in each slot.

    Tokens of ranks on one of `hosts` use replicas there, where there are any; inference, where all
    see all tokens, takes 1.
    """
    layers = placement.physical_to_logical.shape[0]
    slots_LNP, start_LE, replicas_LNE = map(jnp.asarray, placement.routing(hosts))
    tables = LayerTables(
        slots_LNP, start_LE, replicas_LNE, jnp.zeros((layers, placement.num_experts))
    )
    return tables, jnp.asarray(placement.physical_to_logical)
