"""One MoE layer: route, exchange, compute, combine. It runs inside the model's `shard_map`.

`__call__` is the layer in training, where each device has tokens of its own (exchange.py has the
ways to the experts). `serve` is the layer in inference, where every device of the `expert` axis has
all tokens. `choice_rows` and `join_choices` are `serve` in two steps, for experts that come to the
device in several parts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.config.model import MoEConfig
from moe_jax.moe import dispatch, load_balancing
from moe_jax.moe.exchange import make_route, own_rows, own_share, share_in_order, strategy
from moe_jax.moe.experts import Experts, gated_projection
from moe_jax.moe.router import (
    Router,
    RouterStats,
    Routing,
    for_tokens,
    sequence_means,
    total,
)
from moe_jax.moe.stats import LayerStats, count_choices, count_routing
from moe_jax.moe.tables import LayerTables
from moe_jax.ops.linear import project
from moe_jax.parallel.collectives import MESH_AXES, MeshAxes, once, psum, rank, vary
from moe_jax.parallel.sharding import axes_of, gather, param
from moe_jax.utils.annotations import Array, Bool, Float, Int, Key


class MoE(nnx.Module):
    """Router, experts and shared experts of a layer."""

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        out_std: float,
        *,
        routes: bool = True,
        gated: bool = True,
        rngs: nnx.Rngs,
    ):
        """Without `routes` it has no router and is given its routes (`routed`); experts that are
        not `gated` compute ReLU in place of SwiGLU.
        """
        self.config = config
        if routes:
            self.router = Router(config, width, rngs=rngs)
        self.experts = Experts(config, width, out_std, gated=gated, rngs=rngs)
        hidden = config.shared_width
        if hidden:
            self.shared_gate_up = param(
                rngs, (width, 2, hidden), ("width", "gate_up", "hidden"), width**-0.5
            )
            self.shared_down = param(rngs, (width, hidden), ("width", "hidden"), out_std)
        if config.shared_gate:
            self.shared_gate = param(rngs, (width, 1), ("width", "experts"), width**-0.5)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        valid_BS: Bool[Array, "B S"],
        tables: LayerTables,
        full: RouterStats | None = None,
        keys_B: Key[Array, " B"] | None = None,
        axes: MeshAxes = MESH_AXES,
    ) -> tuple[Float[Array, "B S D"], LayerStats]:
        """Experts' output for this device's tokens, and the layer's statistics over all devices.

        `full` are the router's sums over the whole batch when this is a part of it; `keys_B` turns
        noise on.
        """
        if self.config.route_by == "sequence":
            routing, stats = self.router(*sequence_means(x_BSD, valid_BS), tables.bias_E, keys_B)
            return self.routed(x_BSD, valid_BS, routing, stats, tables, full, axes)
        routing, stats = self.router(x_BSD, valid_BS, tables.bias_E, keys_B)
        return self._send(x_BSD, routing, stats, stats.load_E, tables, full, axes)

    def routed(
        self,
        x_BSD: Float[Array, "B S D"],
        valid_BS: Bool[Array, "B S"],
        routing_B: Routing,
        stats: RouterStats,
        tables: LayerTables,
        full: RouterStats | None = None,
        axes: MeshAxes = MESH_AXES,
    ) -> tuple[Float[Array, "B S D"], LayerStats]:
        """As `__call__`, with a route for each sequence, which its valid tokens take. `stats` are
        those of this device's routes; load and losses are theirs, traffic is that of the tokens.
        """
        routing = for_tokens(self.config, routing_B, valid_BS)
        load_E = count_choices(routing.expert_TK, self.config.num_experts)
        return self._send(x_BSD, routing, stats, load_E, tables, full, axes)

    def _send(
        self,
        x_BSD: jax.Array,
        routing: Routing,
        stats: RouterStats,
        load_E: jax.Array,
        tables: LayerTables,
        full: RouterStats | None,
        axes: MeshAxes,
    ) -> tuple[jax.Array, LayerStats]:
        """Tokens to their experts and back; `load_E` are this device's choices."""
        stats = total(stats, axes)
        aux, z = load_balancing.losses(self.config, stats, stats if full is None else full)
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        place, ranks = rank(axes.expert), lax.axis_size(axes.expert)
        host = place * tables.slots_NP.shape[0] // ranks
        slot_TK = dispatch.choose_slots(
            routing.expert_TK,
            tables.slots_NP[host],
            tables.start_E,
            tables.replicas_NE[host],
            place,
        )
        num_slots = tables.slots_NP.shape[1]
        route = make_route(self.config, axes, num_slots // ranks)
        exchange = strategy(self.config, x_TD.shape[0], ranks)
        weights = self.experts.weights(x_TD.dtype)
        routed = exchange(route, x_TD, routing.weight_TK, weights, slot_TK)
        y_TD = psum(routed.y_TD + self._shared(x_TD), axes.tensor)
        y_BSD = y_TD.reshape(x_BSD.shape)
        counts = count_routing(load_E, slot_TK, num_slots, routed.room, axes)
        return y_BSD, LayerStats(stats, aux, z, counts, routed.rounds)

    def _shared(self, x_TD: jax.Array) -> jax.Array:
        """The shared experts' output (a part of a sum over `tensor`), or a zero."""
        if not self.config.shared_experts:
            return jnp.zeros((), x_TD.dtype)
        y_TD = gated_projection(x_TD, self.shared_gate_up, self.shared_down)
        if self.config.shared_gate:
            y_TD = y_TD * jax.nn.sigmoid(project(x_TD, gather(self.shared_gate, x_TD.dtype)))
        return y_TD

    def serve(
        self,
        x_BSD: Float[Array, "B S D"],
        valid_BS: Bool[Array, "B S"],
        tables: LayerTables,
        repeat: Int[Array, ""] | int = 0,
        repeats: int = 1,
    ) -> Float[Array, "B S D"]:
        """Experts' output for tokens that every device of the `expert` axis holds: each computes
        its slots' share of the sum.

        The experts' weights may be those of `repeats` layers one after another, of which this is
        number `repeat`.
        """
        return self._serve(x_BSD, valid_BS, tables, repeat, repeats, False)[0]

    def serve_counted(
        self,
        x_BSD: Float[Array, "B S D"],
        valid_BS: Bool[Array, "B S"],
        tables: LayerTables,
        repeat: Int[Array, ""] | int = 0,
        repeats: int = 1,
        in_order: bool = False,
    ) -> tuple[Float[Array, "B S D"], Int[Array, " P"]]:
        """As `serve`, with how many choices went to each slot.

        With `in_order` each token's experts are summed in the order of its choices, as on one
        device, and not by rank: where experts are changes no bit. Its sum over the `expert` axis
        has K rows per token.
        """
        y_BSD, slot_TK = self._serve(x_BSD, valid_BS, tables, repeat, repeats, in_order)
        return y_BSD, count_choices(slot_TK, tables.slots_NP.shape[-1])

    def _serve(
        self,
        x_BSD: jax.Array,
        valid_BS: jax.Array,
        tables: LayerTables,
        repeat: jax.Array | int,
        repeats: int,
        in_order: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """What `serve` gives, and the slots of the tokens' choices [T, K], P for padding."""
        routing = self.router.choose(x_BSD, valid_BS, tables.bias_E)
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights = self.experts.weights(x_TD.dtype)
        slots = jax.tree.leaves(weights)[0].shape[0] // repeats
        slot_TK = dispatch.choose_slots(
            routing.expert_TK, tables.slots_NP[0], tables.start_E, tables.replicas_NE[0], 0
        )
        route = make_route(self.config, MESH_AXES, slots)
        share = share_in_order if in_order else own_share
        y_TD = share(route, x_TD, routing.weight_TK, weights, slot_TK, repeat * slots)
        return self._with_shared(y_TD, x_TD).reshape(x_BSD.shape), slot_TK

    def choice_rows(
        self, x_TD: Float[Array, "T D"], slot_TK: Int[Array, "T K"]
    ) -> Float[Array, "TK D"]:
        """On one device, the output of each choice's expert, unweighted; zeros for a choice of slot
        P, which no expert is in.

        The experts are those that this layer holds: P may be fewer than there are.
        """
        weights = self.experts.weights(x_TD.dtype)
        route = make_route(self.config, MESH_AXES, jax.tree.leaves(weights)[0].shape[0])
        y_MD, _, inverse_TK = own_rows(route, x_TD, weights, slot_TK)
        return y_MD[inverse_TK.reshape(-1)]

    def join_choices(
        self,
        x_TD: Float[Array, "T D"],
        row_MD: Float[Array, "TK D"],
        weight_TK: Float[Array, "T K"],
    ) -> Float[Array, "T D"]:
        """What `serve` gives, from the sum of `choice_rows` over parts of the experts."""
        return self._with_shared(dispatch.sum_choices(row_MD, weight_TK), x_TD)

    def _with_shared(self, y_TD: jax.Array, x_TD: jax.Array) -> jax.Array:
        """The routed experts' output with that of the shared ones, summed over devices that hold
        parts of it.
        """
        axes = ("expert", "tensor")
        if self.config.shared_experts:
            split = axes_of(self.shared_down, "hidden")
            y_TD = y_TD + once(
                self._shared(x_TD), tuple(axis for axis in axes if axis not in split)
            )
        return psum(vary(y_TD, axes), axes)
