"""What a run is between two steps, and what a step measures."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from moe_jax.moe.stats import LayerStats
from moe_jax.moe.tables import LayerTables
from moe_jax.utils.annotations import Array, Float, Int


class TrainState(NamedTuple):
    """Everything that a run's next step depends on, beside its data."""

    step: Int[Array, ""]  # optimizer steps done, skipped ones included
    seed: Int[Array, ""]  # uint32; the noise of step n has the key fold_in(key(seed), n)
    params: Any
    opt_state: Any
    tables: LayerTables  # stacked over the MoE layers
    expert_LP: Int[Array, "L P"]  # the expert in each slot, -1 for none
    skipped: Int[Array, ""]  # steps whose loss or gradients were not finite, in all
    skipped_in_row: Int[Array, ""]


class Losses(NamedTuple):
    """What a forward pass over a batch gives; losses are means over its counted tokens, in nats."""

    ce_loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    layers: LayerStats | None  # stacked over the MoE layers; None without any

    @property
    def loss(self) -> jax.Array:
        """What is differentiated."""
        return self.ce_loss + self.aux_loss + self.z_loss


class StepStats(NamedTuple):
    """Step statistics: what one training step reports."""

    loss: Float[Array, ""]
    ce_loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    lr: Float[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]
    layers: LayerStats | None  # stacked over the MoE layers; None without any
