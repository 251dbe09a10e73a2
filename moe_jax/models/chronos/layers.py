"""The parts of T5's layers, and the block that embeds patches: attention whose scores are not
scaled, and feed-forward parts with ReLU.

Like the rest of the package they run inside one `shard_map`: series are split over `data` and
`expert`, heads and hidden dims over `tensor`, and parameters are gathered just before use.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.chronos.config import StackConfig
from moe_jax.models.norm import RMSNorm
from moe_jax.ops.attention.api import full_attention
from moe_jax.ops.attention.reference import MASKED
from moe_jax.ops.linear import join, project
from moe_jax.ops.products import einsum_f32
from moe_jax.parallel.collectives import psum
from moe_jax.parallel.sharding import axes_of, bias, gather, param
from moe_jax.utils.annotations import Array, Bool, Float


class UnscaledAttention(nnx.Module):
    """Attention without biases in its projections and without a scale on its scores."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        width, heads, head = config.width, config.num_heads, config.head_width
        shape, axes = (width, heads, head), ("width", "heads", "head")
        factor = config.init_factor
        self.query = param(rngs, shape, axes, factor * (width * head) ** -0.5)
        self.key = param(rngs, shape, axes, factor * width**-0.5)
        self.value = param(rngs, shape, axes, factor * width**-0.5)
        self.out = param(rngs, shape, axes, factor * (heads * head) ** -0.5)

    def queries(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S H Q"]:
        """Queries of this device's heads."""
        return project(x_BSD, gather(self.query, x_BSD.dtype))

    def keys_values(
        self, x_BMD: Float[Array, "B M D"]
    ) -> tuple[Float[Array, "B M H Q"], Float[Array, "B M H Q"]]:
        """Keys and values of this device's heads."""
        return (
            project(x_BMD, gather(self.key, x_BMD.dtype)),
            project(x_BMD, gather(self.value, x_BMD.dtype)),
        )

    def values(self, x_BMD: Float[Array, "B M D"]) -> Float[Array, "B M H Q"]:
        """Values alone."""
        return project(x_BMD, gather(self.value, x_BMD.dtype))

    def project_out(self, x_BSHQ: Float[Array, "B S H Q"]) -> Float[Array, "B S D"]:
        """The heads' outputs joined, the same on all devices that hold heads."""
        return psum(join(x_BSHQ, gather(self.out, x_BSHQ.dtype), 2), axes_of(self.out, "heads"))

    def read(
        self,
        x_BSD: Float[Array, "B S D"],
        states_BMD: Float[Array, "B M D"],
        mask_BM: Bool[Array, "B M"],
    ) -> Float[Array, "B S D"]:
        """What tokens see of an encoder's states.

        One token alone brings its query to the states, and the states that it has looked at to its
        values: projecting all states into keys and values first would be M products for each of
        these, a seventh of all that Chronos-Bolt computes.
        """
        q_BSHQ, dtype = self.queries(x_BSD), x_BSD.dtype
        if x_BSD.shape[1] > 1:
            keys_values = self.keys_values(states_BMD)
            return self.project_out(full_attention(q_BSHQ, *keys_values, mask_BM[:, None]))
        q_BHD = einsum_f32("bshq,dhq->bhd", q_BSHQ, gather(self.key, dtype)).astype(dtype)
        scores_BHM = einsum_f32("bhd,bmd->bhm", q_BHD, states_BMD)
        share_BHM = jax.nn.softmax(jnp.where(mask_BM[:, None], scores_BHM, MASKED))
        seen_BHD = einsum_f32("bhm,bmd->bhd", share_BHM.astype(dtype), states_BMD).astype(dtype)
        out_BHQ = einsum_f32("bhd,dhq->bhq", seen_BHD, gather(self.value, dtype)).astype(dtype)
        return self.project_out(out_BHQ[:, None])

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        mask_BSM: Bool[Array, "#B #S S"],
        bias_HSM: Float[Array, "H S S"] | None = None,
    ) -> Float[Array, "B S D"]:
        k_BSHQ, v_BSHQ = self.keys_values(x_BSD)
        q_BSHQ = self.queries(x_BSD)
        return self.project_out(full_attention(q_BSHQ, k_BSHQ, v_BSHQ, mask_BSM, bias_HSM=bias_HSM))


class ReluFeedForward(nnx.Module):
    """Two matrices around ReLU."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs):
        width, hidden, factor = config.width, config.hidden, config.init_factor
        self.up = param(rngs, (width, hidden), ("width", "hidden"), factor * width**-0.5)
        self.down = param(rngs, (width, hidden), ("width", "hidden"), factor * hidden**-0.5)

    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        h_BSF = jax.nn.relu(project(x_BSD, gather(self.up, x_BSD.dtype)))
        return psum(join(h_BSF, gather(self.down, x_BSD.dtype)), axes_of(self.down, "hidden"))


class ResidualBlock(nnx.Module):
    """A hidden layer with ReLU beside a linear one, all with biases: it embeds patches and makes
    quantiles. `axes` name the dims of its input and output.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        axes: tuple[str, str],
        factor: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.hidden = param(rngs, (inputs, hidden), (axes[0], "hidden"), factor * inputs**-0.5)
        self.hidden_bias = bias((hidden,), ("hidden",))
        self.out = param(rngs, (outputs, hidden), (axes[1], "hidden"), factor * hidden**-0.5)
        self.out_bias = bias((outputs,), ("norm",))
        self.residual = param(rngs, (inputs, outputs), axes, factor * inputs**-0.5)
        self.residual_bias = bias((outputs,), ("norm",))

    def __call__(self, x_BSI: Float[Array, "B S I"]) -> Float[Array, "B S O"]:
        dtype = x_BSI.dtype
        h_BSF = project(x_BSI, gather(self.hidden, dtype)) + gather(self.hidden_bias, dtype)
        y_BSO = join(jax.nn.relu(h_BSF), gather(self.out, dtype))
        y_BSO = psum(y_BSO, axes_of(self.out, "hidden"))
        straight_BSO = project(x_BSI, gather(self.residual, dtype))
        return (
            y_BSO + straight_BSO + gather(self.out_bias, dtype) + gather(self.residual_bias, dtype)
        )


def stack_norm(config: StackConfig, rngs: nnx.Rngs) -> RMSNorm:
    """A norm over the width, whose scale starts at T5's factor."""
    norm = RMSNorm((config.width,), config.norm_eps, rngs=rngs)
    norm.scale.set_value(config.init_factor * norm.scale.get_value())
    return norm
