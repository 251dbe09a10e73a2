"""The experts' weights, in slot order, and their arithmetic over rows sorted by slot: SwiGLU, or
ReLU where an expert has no gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config.model import MoEConfig
from moe_jax.ops.grouped_matmul.api import GroupedMatmulImpl, grouped_matmul
from moe_jax.ops.grouped_matmul.reference import group_of, mask_tail
from moe_jax.ops.linear import join, project
from moe_jax.parallel.collectives import once
from moe_jax.parallel.sharding import axes_of, bias, gather, param
from moe_jax.utils.annotations import Array, Float

ALPHA = 1.702  # of the sigmoid in gpt-oss's clamped SwiGLU


class Experts(nnx.Module):
    """Weights of all slots: `gate_up` [P, D, 2, F] and `down` [P, D, F], FSDP-sharded over D, and
    biases if asked for. Experts that are not `gated` have an up-projection alone, [P, D, 1, F].

    Built with one slot per expert, in logical order.
    """

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        out_std: float,
        *,
        gated: bool = True,
        rngs: nnx.Rngs,
    ):
        experts, hidden, parts = config.num_experts, config.hidden, 1 + gated
        self.limit = config.swiglu_limit
        self.gate_up = param(
            rngs,
            (experts, width, parts, hidden),
            ("slots", "slot_width", "gate_up", "expert_hidden"),
            width**-0.5,
        )
        self.down = param(
            rngs, (experts, width, hidden), ("slots", "slot_width", "expert_hidden"), out_std
        )
        if config.expert_bias:
            self.gate_up_bias = bias(
                (experts, parts, hidden), ("slots", "gate_up", "expert_hidden")
            )
            self.down_bias = bias((experts, width), ("slots", "slot_norm"))

    def weights(self, dtype: Any) -> tuple[Any, ...]:
        """This device's slots for `Grouped`, gathered where FSDP cut them: gate_up, down and,
        if there, their biases.
        """
        matrices = (gather(self.gate_up, dtype), gather(self.down, dtype))
        if not hasattr(self, "down_bias"):
            return matrices
        # The output's bias is added by one of the devices that hold parts of the sum over the
        # hidden dim.
        down_bias = once(gather(self.down_bias, dtype), axes_of(self.down, "expert_hidden"))
        return (*matrices, gather(self.gate_up_bias, dtype), down_bias)


class Grouped(NamedTuple):
    """Experts' weights, and which rows are whose: they are sorted by slot, `sizes_P` rows each,
    zeros after them.

    `weights` are `Experts.weights`, of which slot p is number first + p.
    """

    sizes_P: jax.Array
    weights: tuple[Any, ...]
    limit: float | None
    impl: GroupedMatmulImpl
    first: jax.Array | int = 0

    def hidden(self, x_ND: Float[Array, "N D"]) -> Float[Array, "N F"]:
        """Each row through the first half of its slot's expert."""
        gate_up, _, *biases = self.weights
        is_gated = True
        if isinstance(gate_up, jax.Array):
            is_gated = gate_up.shape[2] == 2
            gate_up = gate_up.reshape(*gate_up.shape[:2], -1)
        both_NF2 = grouped_matmul(x_ND, gate_up, self.sizes_P, first=self.first, impl=self.impl)
        if biases:
            slot_N = self._slots(x_ND.shape[0])
            both_NF2 = both_NF2 + biases[0].reshape(biases[0].shape[0], -1)[slot_N]
        return swiglu(both_NF2, self.limit) if is_gated else jax.nn.relu(both_NF2)

    def output(self, hidden_NF: Float[Array, "N F"]) -> Float[Array, "N D"]:
        """Through the second half; with the hidden dim sharded over `tensor` this device's part of
        a sum.
        """
        _, down, *biases = self.weights
        y_ND = grouped_matmul(
            hidden_NF, down, self.sizes_P, transposed=True, first=self.first, impl=self.impl
        )
        if not biases:
            return y_ND
        return mask_tail(y_ND + biases[1][self._slots(hidden_NF.shape[0])], self.sizes_P)

    def _slots(self, rows: int) -> jax.Array:
        return group_of(jnp.arange(rows), jnp.cumsum(self.sizes_P)) + self.first


def swiglu(both: Float[Array, "... F2"], limit: float | None = None) -> Float[Array, "... F"]:
    """silu(gate) * up of a last dimension that holds gate, then up (Shazeer, 2020); with `limit`,
    gpt-oss's clamped form.
    """
    gate, up = jnp.split(both, 2, axis=-1)
    if limit is None:
        return jax.nn.silu(gate) * up
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(ALPHA * gate) * (up + 1)


def gated_projection(
    x: Float[Array, "... D"],
    gate_up: nnx.Param,
    down: nnx.Param,
    gate_up_bias: nnx.Param | None = None,
) -> Float[Array, "... D"]:
    """SwiGLU of one dense part, `gate_up` [D, 2, F] and `down` [D, F]: with F split over the mesh
    it is this device's part of a sum.
    """
    both = project(x, gather(gate_up, x.dtype))
    if gate_up_bias is not None:
        both = both + gather(gate_up_bias, x.dtype)
    return join(swiglu(both.reshape(*x.shape[:-1], -1)), gather(down, x.dtype))
