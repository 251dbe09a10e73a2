"""The experts' weights, in slot order, and their arithmetic: SwiGLU over rows sorted by slot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.annotations import Array, Float, Int
from moe_jax.ops.grouped_matmul import Impl, grouped_matmul
from moe_jax.schema import MoEConfig
from moe_jax.sharding import param


class Experts(nnx.Module):
    """Weights of all slots: `gate_up` [P, D, 2, F] and `down` [P, D, F], FSDP-sharded over D.

    Built with one slot an expert, in logical order.
    """

    def __init__(self, config: MoEConfig, width: int, out_std: float, *, rngs: nnx.Rngs):
        experts, hidden = config.num_experts, config.hidden
        self.gate_up = param(rngs, (experts, width, 2, hidden), ("slots", "slot_width", "gate_up", "hidden"), width**-0.5)
        self.down = param(rngs, (experts, width, hidden), ("slots", "slot_width", "hidden"), out_std)


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
