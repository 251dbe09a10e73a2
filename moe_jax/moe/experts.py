"""The experts' weights, in slot order, and their arithmetic: SwiGLU over rows sorted by slot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.annotations import Array, Float, Int
from moe_jax.ops.grouped_matmul import Impl, grouped_matmul
from moe_jax.placement.table import EMPTY, Placement
from moe_jax.schema import MoEConfig
from moe_jax.sharding import param


class Experts(nnx.Module):
    """Weights of all slots: `gate_up` [P, D, 2, F] and `down` [P, D, F], FSDP-sharded over D. Empty slots hold zeros."""

    def __init__(self, config: MoEConfig, width: int, placement: Placement, out_std: float, *, rngs: nnx.Rngs):
        shape = (config.num_experts, width, 2, config.hidden)
        # Drawn in logical order, so that the initial experts do not depend on the mesh.
        self.gate_up = param(rngs, shape, ("slots", "slot_width", "gate_up", "hidden"), width**-0.5)
        self.down = param(rngs, (config.num_experts, width, config.hidden), ("slots", "slot_width", "hidden"), out_std)
        table = placement.physical_to_logical[0]
        for weights in (self.gate_up, self.down):
            weights.set_value(to_slots(weights.get_value(), table))


def to_slots(weights: jax.Array, source_P: np.ndarray) -> jax.Array:
    """Rows of the first dimension by index, zeros for EMPTY."""
    source = np.where(source_P == EMPTY, weights.shape[0], source_P)
    return weights.at[source].get(mode="fill", fill_value=0)


def apply_experts(
    x_ND: Float[Array, "N D"],
    sizes_P: Int[Array, " P"],
    gate_up: Float[Array, "P D 2 F"],
    down: Float[Array, "P D F"],
    impl: Impl,
) -> Float[Array, "N D"]:
    """SwiGLU of each row by its slot's weights; rows are sorted by slot, `sizes_P` rows each, zeros after them.

    With `hidden` sharded over `tensor` the result is this device's part of a sum.
    """
    slots, width, _, hidden = gate_up.shape
    both_NF2 = grouped_matmul(x_ND, gate_up.reshape(slots, width, 2 * hidden), sizes_P, impl=impl)
    return grouped_matmul(swiglu(both_NF2), down, sizes_P, transposed=True, impl=impl)


def swiglu(both: Float[Array, "... F2"]) -> Float[Array, "... F"]:
    """silu(gate) * up of a last dimension that holds gate, then up (Shazeer, 2020)."""
    gate, up = jnp.split(both, 2, axis=-1)
    return jax.nn.silu(gate) * up
