"""What a layer counts: where choices come from and go to, kept and dropped."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.moe.router import RouterStats
from moe_jax.parallel.collectives import MeshAxes, psum, rank
from moe_jax.utils.annotations import Array, Float, Int


class RoutingCounts(NamedTuple):
    """Choices counted where they come from and where they go. Ranks are those of the `expert` axis,
    summed over `data`.
    """

    traffic_RE: Int[Array, "R E"]  # by source rank and logical expert
    sent_RR: Int[Array, "R R"]  # that an expert computed, by source and destination rank
    dropped_RR: Int[Array, "R R"]  # for which the pool was full, which happens at the source alone
    # for each device's experts, by data row and rank, dropped ones included
    device_load_NR: Int[Array, "N R"]
    slot_load_P: Int[Array, " P"]  # by slot, dropped ones included


class LayerStats(NamedTuple):
    """Statistics of one layer, the same on every device."""

    router: RouterStats
    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    counts: RoutingCounts
    rounds: Int[Array, ""]

    @property
    def kept(self) -> Any:
        """Choices that an expert computed."""
        return self.counts.sent_RR.sum((-2, -1))

    @property
    def dropped(self) -> Any:
        """Choices that none did."""
        return self.counts.dropped_RR.sum((-2, -1))


def count_choices(expert_TK: Int[Array, "T K"], num_experts: int) -> Int[Array, " E"]:
    """How many choices fell on each expert (or slot, of so many); padding, which chooses expert E
    (or slot P), is not counted.
    """
    chosen_TKE = expert_TK[..., None] == jnp.arange(num_experts)
    return jnp.sum(chosen_TKE, axis=(0, 1), dtype=jnp.int32)


def count_routing(
    load_E: jax.Array, slot_TK: jax.Array, num_slots: int, room: jax.Array, axes: MeshAxes
) -> RoutingCounts:
    """The counts over the mesh, from this device's choices by expert and slot; each rank takes
    `room` rows per device.
    """
    ranks, rows = lax.axis_size(axes.expert), lax.axis_size(axes.data)
    slot_P = jnp.sum(slot_TK.reshape(-1, 1) == jnp.arange(num_slots), axis=0, dtype=jnp.int32)
    asked_R = jnp.sum(slot_P.reshape(ranks, -1), axis=1)
    kept_R = jnp.minimum(asked_R, room)
    # Everyone adds a table with only its own line filled.
    mine_R1 = (jnp.arange(ranks) == rank(axes.expert))[:, None].astype(jnp.int32)
    mine_N1 = (jnp.arange(rows) == rank(axes.data))[:, None].astype(jnp.int32)
    return psum(
        RoutingCounts(
            mine_R1 * load_E,
            mine_R1 * kept_R,
            mine_R1 * (asked_R - kept_R),
            mine_N1 * asked_R,
            slot_P,
        ),
        axes.batch,
    )
