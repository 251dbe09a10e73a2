"""Chronos-Bolt with experts: the feed-forward parts of its decoder are a mixture, routed once per
series by what the encoder made of its REG token.

    model = ChronosMixture(config.model, config.moe, rngs=nnx.Rngs(0))
    loss, figures = model.loss(batch, tables, None, count, None)

A series has one route for all layers of the decoder, and keeps it where a forecast goes on beyond
one pass. The layers are stacked and scanned, and their experts lie in the tree where those of a
language model lie, so placement, migration and checkpoints know them alike. Without experts
(`moe.first_dense`) it is Chronos-Bolt.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.models.batch import SeriesBatch
from moe_jax.models.chronos.bolt import BoltEnds, Encoded
from moe_jax.models.chronos.config import ChronosBoltConfig, bolt_config
from moe_jax.models.chronos.layers import stack_norm
from moe_jax.models.chronos.stacks import DecoderBlock, EncoderBlock, relative_bias
from moe_jax.models.layer_pattern import LayerKind, count_moe_layers, layer_kinds, stack_layers
from moe_jax.models.remat import remat
from moe_jax.models.transformer import for_patterns
from moe_jax.moe.layer import MoE
from moe_jax.moe.router import Router, RouterStats, Routing, no_stats
from moe_jax.moe.stats import LayerStats
from moe_jax.moe.tables import LayerTables, make_tables
from moe_jax.ops.loops import scan
from moe_jax.parallel.collectives import BATCH_AXES, psum
from moe_jax.parallel.sharding import stream_of
from moe_jax.placement.table import contiguous
from moe_jax.utils.annotations import Array, Float, Key

# Of REG's embedding when training starts: small, so that what REG has read of a series decides its
# route. One as large as the rest makes all series take the same.
TOKEN_STD = 0.02
# Of the biases by relative position when training starts, all that tells one patch from another.
# With T5's, an eighth at width 64, the loss stood for a thousand steps (docs/log.md).
BIAS_STD = 1.0


class SeriesLayers(nnx.Module):
    """One repeat of a stack's pattern of layers."""

    def __init__(
        self,
        config: ChronosBoltConfig,
        moe: MoEConfig,
        kinds: tuple[LayerKind, ...],
        *,
        rngs: nnx.Rngs,
    ):
        self.kinds = kinds
        self.blocks: nnx.List[Any] = nnx.List([])
        for kind in kinds:
            self.blocks.append(_make_block(config, moe, kind, rngs))


def _make_block(
    config: ChronosBoltConfig, moe: MoEConfig, kind: LayerKind, rngs: nnx.Rngs
) -> EncoderBlock | DecoderBlock:
    """One layer."""
    stack = config.stack
    if not kind.reads_encoder:
        return EncoderBlock(stack, rngs=rngs)
    if not kind.moe:
        return DecoderBlock(stack, rngs=rngs)
    out_std = stack.init_factor * moe.hidden**-0.5
    mlp = MoE(moe, stack.width, out_std, routes=False, gated=False, rngs=rngs)
    return DecoderBlock(stack, mlp, rngs=rngs)


def _make_layers(
    config: ChronosBoltConfig,
    moe: MoEConfig,
    kinds: tuple[LayerKind, ...],
    stream: str,
    key: jax.Array,
) -> SeriesLayers:
    return SeriesLayers(config, moe, kinds, rngs=nnx.Rngs(**{stream: key}))


class Routed(NamedTuple):
    """The routes of this device's series, and their sums."""

    routing: Routing
    stats: RouterStats


class ChronosMixture(nnx.Module):
    """Series [B, T] to quantiles [B, Q, H] of the `prediction_length` steps after them."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, *, rngs: nnx.Rngs):
        config = bolt_config(model)
        self.config, self.ends = config, BoltEnds(config, TOKEN_STD, rngs=rngs)
        stack = config.stack
        self.moe, self.moe_layers = moe, count_moe_layers(model, moe)
        self.remat, self.dtype = model.remat, jnp.dtype(model.compute_dtype)
        if self.moe_layers:
            self.router = Router(moe, stack.width, rngs=rngs)
        self.encoder_bias = relative_bias(stack, causal=False, std=BIAS_STD, rngs=rngs)
        self.decoder_bias = relative_bias(stack, causal=True, std=BIAS_STD, rngs=rngs)
        self.encoder_norm, self.decoder_norm = stack_norm(stack, rngs), stack_norm(stack, rngs)
        self.stacks: nnx.List[Any] = nnx.List([])
        stream = stream_of(rngs)
        for kinds, repeats in stack_layers(layer_kinds(model, moe)):
            make = partial(_make_layers, config, moe, kinds, stream)
            self.stacks.append(nnx.vmap(make)(jax.random.split(rngs[stream](), repeats)))

    def loss(
        self,
        batch: SeriesBatch,
        tables: LayerTables,
        full: RouterStats | None,
        count: Float[Array, ""],
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, ""], LayerStats | None]:
        """The quantile loss of the mesh's batch, over `count`, and figures stacked over the layers
        that have experts; arguments as those of a language model.
        """
        encoded = self.encode(batch.context)
        routed = self.route(encoded, tables, self._keys(key, batch)) if self.moe_layers else None
        y_BQH, stats = self.decode(encoded, routed, tables, full)
        loss = jnp.sum(self.ends.losses_of(y_BQH, encoded.scale, batch.target))
        return psum(loss / count, BATCH_AXES), stats

    def encode(self, context_BT: Float[Array, "B T"]) -> Encoded:
        """Series as the encoder leaves them."""
        given = self.ends.embed(context_BT)
        x_BMD = given.states_BMD.astype(self.dtype)
        bias_HMM = self.encoder_bias(x_BMD.shape[1], x_BMD.shape[1])
        for stack in self.stacks:
            if not stack.kinds[0].reads_encoder:
                graph, state = nnx.split(stack)
                run = partial(_run_encoder, graph, given.mask_BM, bias_HMM)
                x_BMD, _ = scan(remat(self.remat, run), x_BMD, state)
        return given._replace(states_BMD=self.encoder_norm(x_BMD))

    def route(
        self, encoded: Encoded, tables: LayerTables, keys_B: Key[Array, " B"] | None = None
    ) -> Routed:
        """The one route of each series, by its REG token; `keys_B` turns training noise on."""
        reg_B1D = encoded.states_BMD[:, -1:]
        # The layers have one load, so their balance biases are the same.
        return Routed(*self.router(reg_B1D, encoded.mask_BM[:, -1:], tables.bias_E[0], keys_B))

    def decode(
        self,
        encoded: Encoded,
        routed: Routed | None,
        tables: LayerTables,
        full: RouterStats | None = None,
    ) -> tuple[Float[Array, "B Q H"], LayerStats | None]:
        """Quantiles in units of the model, and the figures of the layers with experts."""
        x_B1D = self.ends.token(self.config.start, encoded.states_BMD)
        bias_HSS, figures, done = self.decoder_bias(1, 1), [], 0
        for stack in self.stacks:
            if not stack.kinds[0].reads_encoder:
                continue
            moes = sum(kind.moe for kind in stack.kinds)
            graph, state = nnx.split(stack)
            repeats = jax.tree.leaves(state)[0].shape[0]
            inputs = for_patterns((tables, full), done, repeats, moes)
            run = partial(_run_decoder, graph, encoded, bias_HSS, routed)
            x_B1D, stats = scan(remat(self.remat, run), x_B1D, (state, inputs))
            done += repeats * moes
            figures += [jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stats)] if moes else []
        y_BQH = self.ends.quantiles_of(self.decoder_norm(x_B1D)).astype(jnp.float32)
        if not figures:
            return y_BQH, None
        stats = jax.tree.map(lambda *a: jnp.concatenate(a), *figures)
        # One decision for all layers, whose losses count once.
        return y_BQH, stats._replace(aux_loss=stats.aux_loss / done, z_loss=stats.z_loss / done)

    def predict(self, batch: SeriesBatch, tables: LayerTables) -> Float[Array, "B Q H"]:
        """Quantiles in units of the series, by experts in the slots of `tables`."""
        encoded = self.encode(batch.context)
        routed = self.route(encoded, tables) if self.moe_layers else None
        return encoded.scale.restore(self.decode(encoded, routed, tables)[0])

    def forecast(
        self, context_BT: Float[Array, "B T"], bias_LE: Float[Array, "L E"] | None = None
    ) -> tuple[Float[Array, "B Q H"], Routing | None]:
        """Quantiles, and the routes, from which `forecast_on` goes on. Rows are split over the
        mesh as in training, the experts as their slots are; `bias_LE` is the balance bias.
        """
        encoded = self.encode(context_BT)
        if not self.moe_layers:
            return self._restored(encoded, None), None
        routed = self.route(encoded, self._tables(bias_LE))
        return self._restored(encoded, routed), routed.routing

    def forecast_on(
        self, context_BT: Float[Array, "B T"], routing: Routing
    ) -> Float[Array, "B Q H"]:
        """As `forecast`, for series that have their routes already."""
        return self._restored(self.encode(context_BT), Routed(routing, no_stats(self.moe)))

    def _restored(self, encoded: Encoded, routed: Routed | None) -> jax.Array:
        y_BQH, _ = self.decode(encoded, routed, self._tables(None))
        return encoded.scale.restore(y_BQH)

    def _tables(self, bias_LE: jax.Array | None) -> LayerTables:
        """Tables of experts in logical order, spread evenly over the ranks."""
        ranks = lax.axis_size("expert")
        tables, _ = make_tables(contiguous(self.moe_layers, self.moe.num_experts, ranks))
        return tables if bias_LE is None else tables._replace(bias_E=bias_LE)

    def _keys(self, key: jax.Array | None, batch: SeriesBatch) -> jax.Array | None:
        """A key per series, where the router's training noise is on."""
        if key is None or not (self.moe.input_noise or self.moe.expert_dropout):
            return None
        return jax.vmap(jax.random.fold_in, (None, 0))(key, batch.sequences)


def _run_encoder(
    graph: nnx.GraphDef, mask_BM: jax.Array, bias_HMM: jax.Array, x_BMD: jax.Array, state: Any
) -> tuple[jax.Array, None]:
    """The scan's body in the encoder: one repeat of a pattern."""
    for block in nnx.merge(graph, state).blocks:
        x_BMD = block(x_BMD, mask_BM, bias_HMM)
    return x_BMD, None


def _run_decoder(
    graph: nnx.GraphDef,
    encoded: Encoded,
    bias_HSS: jax.Array,
    routed: Routed | None,
    x_BSD: jax.Array,
    inputs: Any,
) -> tuple[jax.Array, LayerStats | None]:
    """The scan's body in the decoder: one repeat of a pattern, with the tables of its layers that
    have experts.
    """
    state, per_layer = inputs
    layers, at, stats = nnx.merge(graph, state), 0, []
    for block, kind in zip(layers.blocks, layers.kinds, strict=True):
        x_BSD = block.attend(x_BSD, encoded.states_BMD, encoded.mask_BM, bias_HSS)
        h_BSD = block.mlp_norm(x_BSD)
        if not kind.moe:
            x_BSD = x_BSD + block.mlp(h_BSD)
            continue
        assert routed is not None
        tables, full = jax.tree.map(lambda a, at=at: a[at], per_layer)
        valid_BS = jnp.ones(h_BSD.shape[:2], bool)
        y_BSD, figures = block.mlp.routed(h_BSD, valid_BS, *routed, tables, full)
        x_BSD = x_BSD + y_BSD
        stats.append(figures)
        at += 1
    return x_BSD, jax.tree.map(lambda *a: jnp.stack(a), *stats) if stats else None
