"""The decoder-only transformer. It runs inside one `shard_map` over the whole mesh: every device
holds a part of the batch and a shard of each parameter, gathers parameters just before use, and
swaps tokens in the MoE layers.

Layers of a repeating pattern are stacked and scanned, so compile time does not grow with depth.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.models.attention import Attention, LatentAttention
from moe_jax.models.batch import Batch, LayerCache, NewTokens
from moe_jax.models.embedding import embed
from moe_jax.models.feed_forward import FeedForward
from moe_jax.models.head import batch_loss
from moe_jax.models.layer_pattern import LayerKind, layer_kinds, stack_layers
from moe_jax.models.norm import RMSNorm
from moe_jax.models.remat import remat
from moe_jax.models.weight_layout import BankParts
from moe_jax.moe.layer import MoE
from moe_jax.moe.router import RouterStats
from moe_jax.moe.stats import LayerStats
from moe_jax.moe.tables import LayerTables
from moe_jax.ops.loops import scan
from moe_jax.parallel.collectives import vary, vma
from moe_jax.parallel.half_bits import are_bits
from moe_jax.parallel.sharding import gather, param, stream_of
from moe_jax.utils.annotations import Array, Float, Int, Key, Shaped


class Block(nnx.Module):
    """Attention, then experts or a dense feed-forward part, each behind a norm and a residual."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        out_std = (2 * model.num_layers) ** -0.5
        self.attention_norm = RMSNorm((model.width,), model.norm_eps, rngs=rngs)
        make = LatentAttention if model.latent.kv_rank else Attention
        self.attention = make(
            model, kind.window, out_std * (model.num_heads * model.value_width) ** -0.5, rngs=rngs
        )
        self.mlp_norm = RMSNorm((model.width,), model.norm_eps, rngs=rngs)
        self.mlp: MoE | FeedForward
        if kind.moe:
            self.mlp = MoE(moe, model.width, out_std * moe.hidden**-0.5, rngs=rngs)
        else:
            self.mlp = FeedForward(model, out_std * model.hidden**-0.5, rngs=rngs)

    def __call__(
        self,
        x_BSD: jax.Array,
        batch: Batch,
        tables: LayerTables | None,
        full: RouterStats | None,
        keys_B: jax.Array | None,
    ) -> tuple[jax.Array, LayerStats | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), batch)
        h_BSD = self.mlp_norm(x_BSD)
        if isinstance(self.mlp, FeedForward):
            return x_BSD + self.mlp(h_BSD), None
        assert tables is not None
        y_BSD, stats = self.mlp(h_BSD, batch.segments > 0, tables, full, keys_B)
        return x_BSD + y_BSD, stats

    def prefill(
        self,
        x_BSD: jax.Array,
        new: NewTokens,
        tables: LayerTables | None,
        cache: LayerCache,
        repeat: jax.Array,
        first: int,
        repeats: int,
    ) -> tuple[jax.Array, LayerCache]:
        """The first tokens of all rows through the layer. The cache is that of all repeats, of
        which this is one, and the experts' weights are those of `repeats` from the `first` on.
        """
        x_BSD, h_BSD, cache = self.prefill_attention(x_BSD, new, cache, repeat)
        return x_BSD + self._serve(h_BSD, new, tables, repeat - first, repeats), cache

    def decode(
        self,
        x_BSD: jax.Array,
        new: NewTokens,
        tables: LayerTables | None,
        cache: LayerCache,
        repeat: jax.Array,
        first: int,
        repeats: int,
    ) -> tuple[jax.Array, LayerCache]:
        """As `prefill`, for new tokens of rows whose earlier tokens are in the cache."""
        x_BSD, h_BSD, cache = self.decode_attention(x_BSD, new, cache, repeat)
        return x_BSD + self._serve(h_BSD, new, tables, repeat - first, repeats), cache

    def decode_counted(
        self,
        x_BSD: jax.Array,
        new: NewTokens,
        tables: LayerTables | None,
        cache: LayerCache,
        repeat: jax.Array,
        first: int,
        repeats: int,
        in_order: bool,
    ) -> tuple[jax.Array, LayerCache, jax.Array | None]:
        """As `decode`, with the choices that went to each slot, i32 [P]; None without experts."""
        if isinstance(self.mlp, FeedForward):
            return *self.decode(x_BSD, new, tables, cache, repeat, first, repeats), None
        assert tables is not None
        x_BSD, h_BSD, cache = self.decode_attention(x_BSD, new, cache, repeat)
        y_BSD, load_P = self.mlp.serve_counted(
            h_BSD, new.valid, tables, repeat - first, repeats, in_order
        )
        return x_BSD + y_BSD, cache, load_P

    def prefill_attention(
        self, x_BSD: jax.Array, new: NewTokens, cache: LayerCache, repeat: jax.Array
    ) -> tuple[jax.Array, jax.Array, LayerCache]:
        """`prefill` up to the feed-forward part: the residual stream, that part's input, and the
        cache.
        """
        y_BSD, cache = self.attention.prefill(self.attention_norm(x_BSD), new, cache, repeat)
        x_BSD = x_BSD + y_BSD
        return x_BSD, self.mlp_norm(x_BSD), cache

    def decode_attention(
        self, x_BSD: jax.Array, new: NewTokens, cache: LayerCache, repeat: jax.Array
    ) -> tuple[jax.Array, jax.Array, LayerCache]:
        """`decode` up to the feed-forward part, as `prefill_attention`."""
        y_BSD, cache = self.attention.decode(self.attention_norm(x_BSD), new, cache, repeat)
        x_BSD = x_BSD + y_BSD
        return x_BSD, self.mlp_norm(x_BSD), cache

    def _serve(
        self,
        h_BSD: jax.Array,
        new: NewTokens,
        tables: LayerTables | None,
        repeat: jax.Array,
        repeats: int,
    ) -> jax.Array:
        """The feed-forward part's output."""
        if isinstance(self.mlp, FeedForward):
            return self.mlp(h_BSD)
        assert tables is not None
        return self.mlp.serve(h_BSD, new.valid, tables, repeat, repeats)


class LayerPattern(nnx.Module):
    """One repeat of a stack's pattern of layers."""

    def __init__(
        self, model: ModelConfig, moe: MoEConfig, kinds: tuple[LayerKind, ...], *, rngs: nnx.Rngs
    ):
        self.kinds = kinds
        self.blocks = nnx.List([Block(model, moe, kind, rngs=rngs) for kind in kinds])


def _make_pattern(
    model: ModelConfig, moe: MoEConfig, kinds: tuple[LayerKind, ...], stream: str, key: jax.Array
) -> LayerPattern:
    return LayerPattern(model, moe, kinds, rngs=nnx.Rngs(**{stream: key}))


class Transformer(nnx.Module):
    """Tokens in, final hidden states and the MoE layers' figures out.

    It is built with experts in logical order; a training program's are drawn into slots
    (models/initial_values.py).
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, vocab_size: int, *, rngs: nnx.Rngs):
        self.config = model
        self.noisy = bool(moe.input_noise or moe.expert_dropout)
        self.embedding = param(rngs, (model.width, vocab_size), ("width", "vocab"), 0.02)
        self.final_norm = RMSNorm((model.width,), model.norm_eps, rngs=rngs)
        if not model.tied_embeddings:
            self.head = param(rngs, (model.width, vocab_size), ("width", "vocab"), 0.02)
        self.stacks: nnx.List[Any] = nnx.List([])
        stream = stream_of(rngs)
        for kinds, repeats in stack_layers(layer_kinds(model, moe)):
            make = partial(_make_pattern, model, moe, kinds, stream)
            self.stacks.append(nnx.vmap(make)(jax.random.split(rngs[stream](), repeats)))

    def __call__(
        self,
        batch: Batch,
        tables: LayerTables,
        full: RouterStats | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerStats | None]:
        """Normalised hidden states, and figures stacked over the MoE layers.

        `tables` (and `full`) are stacked over the MoE layers; `key` turns the router's training
        noise on.
        """
        dtype = jnp.dtype(self.config.compute_dtype)
        x_BSD = embed(self.embedding, batch.tokens, dtype)
        per_layer = (tables, full, jnp.arange(tables.start_E.shape[0]))
        done, stats = 0, []
        for stack in self.stacks:
            moes = sum(kind.moe for kind in stack.kinds)
            graph, state = nnx.split(stack)
            repeats = jax.tree.leaves(state)[0].shape[0]
            inputs = for_patterns(per_layer, done, repeats, moes)
            run = partial(_run_pattern, graph, batch, key if self.noisy else None)
            x_BSD, figures = scan(remat(self.config.remat, run), x_BSD, (state, inputs))
            done += repeats * moes
            stats += [jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), figures)] if moes else []
        return (
            self.final_norm(x_BSD),
            jax.tree.map(lambda *a: jnp.concatenate(a), *stats) if stats else None,
        )

    def loss(
        self,
        batch: Batch,
        tables: LayerTables,
        full: RouterStats | None,
        count: Float[Array, ""],
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, ""], LayerStats | None]:
        """The cross-entropy of the mesh's batch in nats, over `count`, and the figures."""
        hidden_BSD, stats = self(batch, tables, full, key)
        weight_T = (batch.mask / count).reshape(-1)
        hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        loss = batch_loss(self.head_parameter, hidden_TD, batch.targets.reshape(-1), weight_T)
        return loss, stats

    def head_weights(self) -> Shaped[Array, "D V"]:
        """This device's columns of the output head, in the compute type or as its bits
        (parallel/half_bits.py).
        """
        held = self.head_parameter.get_value()
        if are_bits(held):
            return held
        return gather(self.head_parameter, self.config.compute_dtype)

    @property
    def head_parameter(self) -> nnx.Param:
        """The output head's parameter: the embedding where both are one."""
        return self.embedding if self.config.tied_embeddings else self.head

    def prefill(
        self, new: NewTokens, tables: LayerTables, cache: list[Any]
    ) -> tuple[Float[Array, "B S D"], list[Any]]:
        """Normalised hidden states of the first tokens of all rows, and the cache with their keys
        and values; no row of the given cache holds tokens.

        The cache has for each stack a list with the `LayerCache` of each block of its pattern.
        """
        return self._through_layers(Block.prefill, new, tables, cache)[:2]

    def decode(
        self, new: NewTokens, tables: LayerTables, cache: list[Any]
    ) -> tuple[Float[Array, "B S D"], list[Any]]:
        """As `prefill`, for new tokens of rows whose earlier tokens are in the cache."""
        return self._through_layers(Block.decode, new, tables, cache)[:2]

    def decode_counted(
        self, new: NewTokens, tables: LayerTables, cache: list[Any], in_order: bool = False
    ) -> tuple[Float[Array, "B S D"], list[Any], Int[Array, "L P"]]:
        """As `decode`, with how many choices of this device's tokens went to each slot. With
        `in_order`, where experts are changes no bit (moe/layer.py).
        """
        through_block = partial(Block.decode_counted, in_order=in_order)
        slots_LNP = tables.slots_NP
        load_LP = jnp.zeros((slots_LNP.shape[0], slots_LNP.shape[-1]), jnp.int32)
        load_LP = vary(load_LP, vma(new.length))
        return self._through_layers(through_block, new, tables, cache, load_LP)

    def _through_layers(
        self,
        through_block: Any,
        new: NewTokens,
        tables: LayerTables,
        cache: list[Any],
        load_LP: jax.Array | None = None,
    ) -> tuple[jax.Array, list[Any], Any]:
        """New tokens through all layers, by `Block.prefill`, `Block.decode` or
        `Block.decode_counted`, which writes to `load_LP`.

        The cache's arrays travel through the scan whole and are updated in place, and the experts'
        bank is read in place too: cutting a layer's part out would copy it. A bank in parts has a
        scan for each, which cuts the other weights where it needs them.
        """
        x_BSD = embed(self.embedding, new.tokens, jnp.dtype(self.config.compute_dtype))
        cache_after, done = [], 0
        for stack, stack_cache in zip(self.stacks, cache, strict=True):
            moes = sum(kind.moe for kind in stack.kinds)
            split: tuple[Any, ...] = nnx.split(stack, nnx.PathContains("experts"), ...)
            graph, banks, state = split
            repeats = jax.tree.leaves(state)[0].shape[0]
            by_repeat = (state, for_patterns(tables, done, repeats, moes))
            first = 0
            for bank in _bank_parts(banks):
                layers = jax.tree.leaves(bank)[0].shape[0] if moes else repeats
                bank = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), bank)
                run = partial(_serve_pattern, through_block, graph, bank, first, layers, done, new)
                numbers = jnp.arange(first, first + layers)
                inputs: Any = (*by_repeat, numbers)
                if layers < repeats:
                    run, inputs = partial(_cut_repeat, run, by_repeat), numbers
                (x_BSD, stack_cache, load_LP), _ = lax.scan(
                    run, (x_BSD, stack_cache, load_LP), inputs
                )
                first += layers
            done += repeats * moes
            cache_after.append(stack_cache)
        return self.final_norm(x_BSD), cache_after, load_LP


def _serve_pattern(
    through_block: Any,
    graph: nnx.GraphDef,
    banks: Any,
    first: int,
    repeats: int,
    done: int,
    new: NewTokens,
    carry: Any,
    inputs: Any,
) -> tuple[Any, None]:
    """The scan's body: one repeat of a pattern over new tokens; `banks` are those of `repeats` from
    the `first` on. Choices are carried, not stacked (`Platform.stacks_in_loops`); `done` MoE layers
    are before this stack's.
    """
    (x_BSD, cache, load_LP), (state, tables, repeat) = carry, inputs
    pattern = nnx.merge(graph, banks, state)
    at, cache_after, moes = 0, [], sum(kind.moe for kind in pattern.kinds)
    for block, kind, layer_cache in zip(pattern.blocks, pattern.kinds, cache, strict=True):
        table = jax.tree.map(lambda a, at=at: a[at], tables) if kind.moe else None
        x_BSD, layer_cache, *load = through_block(
            block, x_BSD, new, table, layer_cache, repeat, first, repeats
        )
        cache_after.append(layer_cache)
        if load and kind.moe:
            layer = done + repeat * moes + at
            load_LP = lax.dynamic_update_index_in_dim(load_LP, load[0], layer, 0)
        at += kind.moe
    return (x_BSD, cache_after, load_LP), None


def _cut_repeat(run: Any, by_repeat: Any, carry: Any, repeat: jax.Array) -> tuple[Any, Any]:
    """`run` for one repeat of what is stacked over all of them, as `lax.scan` cuts its inputs."""
    one = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, repeat, keepdims=False), by_repeat)
    return run(carry, (*one, repeat))


def _bank_parts(banks: Any) -> list[Any]:
    """Experts' weights as they are held together: all of a stack's, or those of some repeats."""

    def is_cut(bank: Any) -> bool:
        return isinstance(bank, BankParts)

    cut = [bank for bank in jax.tree.leaves(banks, is_leaf=is_cut) if is_cut(bank)]
    if not cut:
        return [banks]
    return [
        jax.tree.map(lambda bank, part=part: bank.parts[part], banks, is_leaf=is_cut)
        for part in range(len(cut[0].parts))
    ]


def for_patterns(per_layer: Any, start: int, repeats: int, moes: int) -> Any:
    """Arrays stacked over MoE layers, cut to those of a stack: [repeats, MoE layers of the unit,
    ...].
    """
    return jax.tree.map(
        lambda a: a[start : start + repeats * moes].reshape(repeats, moes, *a.shape[1:]), per_layer
    )


def _run_pattern(
    graph: nnx.GraphDef, batch: Batch, key: jax.Array | None, x_BSD: jax.Array, inputs: Any
):
    """The scan's body: one repeat of a pattern, with the tables of its MoE layers [layers of the
    unit, ...].
    """
    state, (tables, full, layers) = inputs
    unit = nnx.merge(graph, state)
    at, stats = 0, []
    for block, kind in zip(unit.blocks, unit.kinds, strict=True):
        if not kind.moe:
            x_BSD, _ = block(x_BSD, batch, None, None, None)
            continue
        table, sums, layer = jax.tree.map(lambda a, at=at: a[at], (tables, full, layers))
        keys_B = (
            None
            if key is None
            else jax.vmap(jax.random.fold_in, (None, 0))(
                jax.random.fold_in(key, layer), batch.sequences
            )
        )
        x_BSD, figures = block(x_BSD, batch, table, sums, keys_B)
        stats.append(figures)
        at += 1
    return x_BSD, jax.tree.map(lambda *a: jnp.stack(a), *stats) if stats else None
