"""Inference on a device that cannot hold all experts: they stay in host memory, and the device
keeps those used last.

    engine = offload(plan, params, tables, size=16)   # where a `ResidentEngine` would be
    engine.expert_counts.hit_rate

A layer runs in parts. Attention and the router run first; the numbers of the chosen experts come to
the host; those that the device lacks are copied over the least recently used (expert_cache.py);
then the experts run, each choice with the slot of its expert as data, so that nothing compiles
again. Where more experts are chosen than there are slots, as in a prompt, the slots are filled in
rounds, and each choice's row is computed in one of them: the sums are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.errors import UserError
from moe_jax.inference.engine import compile_on, score_arguments
from moe_jax.inference.expert_cache import ExpertCache, ExpertCounts
from moe_jax.inference.kv_cache import Cache, CacheLayout
from moe_jax.inference.output import all_logits, last_logits, total_nats
from moe_jax.models.batch import NewTokens
from moe_jax.models.embedding import embed
from moe_jax.models.layer_pattern import count_moe_layers, layer_kinds, stack_layers
from moe_jax.models.paths import nested
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.models.transformer import Block
from moe_jax.moe.router import Routing
from moe_jax.moe.tables import LayerTables
from moe_jax.parallel.half_bits import as_bits
from moe_jax.runtime.platform import platform_of


class ExpertParts(NamedTuple):
    """The compiled parts of a layer behind its router, of layers of one kind."""

    whole: Any  # all experts' part, where one round is enough for any choice
    add: Any  # one of several rounds
    join: Any  # what follows the rounds


class LayerParts(NamedTuple):
    """The compiled parts of layers of one kind.

    Without experts, `prefill` and `decode` are the whole layer; with them, what is up to the
    router's choice.
    """

    prefill: Any
    decode: Any
    experts: ExpertParts | None


class Layer(NamedTuple):
    """Where a layer's cache is, and how it runs."""

    stack: int
    block: int
    repeat: Any  # i32 []
    number: int  # among layers with experts, for those that have them
    parts: LayerParts


class Ends(NamedTuple):
    """The compiled parts of the model before and after its layers."""

    embed: Any
    last_logits: Any
    all_logits: Any
    total_nats: Any


class OffloadedWeights(NamedTuple):
    """A model's weights by layer, and its experts apart."""

    ends: Any  # what is of no layer, on the device
    layers: list[Any]  # without their experts, on the device
    experts: list[list[Any]]  # [MoE layer][expert] in host memory, in logical order


@dataclass
class Usage:
    """What was asked of the experts' cache in one kind of pass."""

    tokens: int
    hits_L: np.ndarray
    misses_L: np.ndarray

    @classmethod
    def none(cls, layers: int) -> Usage:
        """Before the first pass."""
        return cls(0, np.zeros(layers, np.int64), np.zeros(layers, np.int64))


class OffloadEngine:
    """An `Engine` whose experts are in host memory. Its slots outlive a sequence, and all sequences
    share them.
    """

    def __init__(
        self,
        plan: ServingPlan,
        weights: OffloadedWeights,
        tables: LayerTables,
        size: int,
        host_memory: str,
    ):
        """`size` slots per layer begin empty; `host_memory` says where the experts are."""
        self.plan, self.tables, self.weights = plan, tables, weights
        self.layout, self.size, self.host_memory = CacheLayout(plan), size, host_memory
        self._on_device = NamedSharding(plan.mesh, P())

        def empty(a: Any) -> jax.Array:
            return jnp.zeros((size, *a.shape), a.dtype, device=self._on_device)

        self._banks = [jax.tree.map(empty, layer[0]) for layer in weights.experts]
        self._slots = [ExpertCache(plan.moe.num_experts, size) for _ in weights.experts]
        self._reading = Usage.none(len(weights.experts))
        self._decoding = Usage.none(len(weights.experts))
        self._layers, self._ends = _compile_model(plan)
        self._put = compile_on(plan.mesh, _put, P(), P(), donated=(0,))

    # Figures

    @property
    def expert_counts(self) -> ExpertCounts:
        """Of all tokens since the model was opened."""
        return self._count(self._reading, self._decoding)

    @property
    def decode_counts(self) -> ExpertCounts:
        """Of those that came one by one."""
        return self._count(self._decoding)

    def expert_figures(self) -> dict[str, Any]:
        """Both, as `moe-jax bench` shows them."""
        every, decoding = self.expert_counts, self.decode_counts
        return {
            "expert_cache_size": self.size,
            "expert_memory": self.host_memory,
            "expert_hit_rate": every.hit_rate,
            "expert_hits": int(every.hits_L.sum()),
            "expert_misses": int(every.misses_L.sum()),
            "expert_bytes": int(every.bytes_L.sum()),
            "expert_hits_by_layer": every.hits_L.tolist(),
            "expert_misses_by_layer": every.misses_L.tolist(),
            "decode_hit_rate": decoding.hit_rate,
            "decode_expert_bytes_per_token": round(decoding.bytes_per_token),
        }

    def _count(self, *usages: Usage) -> ExpertCounts:
        one = sum(array.nbytes for array in jax.tree.leaves(self.weights.experts[0][0]))
        misses_L = np.sum([usage.misses_L for usage in usages], axis=0)
        return ExpertCounts(
            sum(usage.tokens for usage in usages),
            np.sum([usage.hits_L for usage in usages], axis=0),
            misses_L,
            misses_L * one,
        )

    # What `Engine` asks for

    def prefill(self, cache: Cache, new: NewTokens) -> tuple[jax.Array, Cache]:
        """As `Engine.prefill`."""
        x_BSD, cache = self._through_layers(lambda parts: parts.prefill, cache, new)
        return self._ends.last_logits(self.weights.ends, x_BSD, new), cache

    def decode(self, cache: Cache, new: NewTokens) -> tuple[jax.Array, Cache]:
        """As `Engine.decode`."""
        x_BSD, cache = self._through_layers(lambda parts: parts.decode, cache, new)
        return self._ends.last_logits(self.weights.ends, x_BSD, new), cache

    def all_logits(self, new: NewTokens) -> jax.Array:
        """As `Engine.all_logits`."""
        cache = self.layout.new(*new.tokens.shape)
        x_BSD, _ = self._through_layers(lambda parts: parts.prefill, cache, new)
        return self._ends.all_logits(self.weights.ends, x_BSD)

    def score(self, tokens_BS: Any, targets_BS: Any, mask_BS: Any) -> tuple[float, float]:
        """As `Engine.score`."""
        new, targets_BS, mask_BS = score_arguments(self.plan, tokens_BS, targets_BS, mask_BS)
        cache = self.layout.new(*new.tokens.shape)
        x_BSD, _ = self._through_layers(lambda parts: parts.prefill, cache, new)
        nats, count = self._ends.total_nats(self.weights.ends, x_BSD, targets_BS, mask_BS)
        return float(nats), float(count)

    def _through_layers(
        self, part_of: Callable[[LayerParts], Any], cache: Cache, new: NewTokens
    ) -> tuple[jax.Array, Cache]:
        """New tokens through all layers, by one part of each."""
        x_BSD = self._ends.embed(self.weights.ends, new.tokens)
        cache = [list(stack) for stack in cache]
        usage = self._decoding if new.tokens.shape[1] == 1 else self._reading
        usage.tokens += int(np.sum(new.length))
        for layer, weights in zip(self._layers, self.weights.layers, strict=True):
            run = part_of(layer.parts)
            layer_cache = cache[layer.stack][layer.block]
            if layer.parts.experts is None:
                x_BSD, layer_cache = run(weights, x_BSD, new, layer_cache, layer.repeat)
            else:
                bank, number = self._banks[layer.number], np.int32(layer.number)
                x_BSD, h_TD, routing, layer_cache = run(
                    weights, bank, self.tables.bias_E, number, x_BSD, new, layer_cache, layer.repeat
                )
                x_BSD = self._run_experts(
                    layer.parts.experts, layer.number, usage, weights, x_BSD, h_TD, routing
                )
            cache[layer.stack][layer.block] = layer_cache
        return x_BSD, cache

    def _run_experts(
        self,
        parts: ExpertParts,
        layer: int,
        usage: Usage,
        weights: Any,
        x_BSD: Any,
        h_TD: Any,
        routing: Routing,
    ) -> jax.Array:
        """The residual stream after a layer's experts."""
        expert_TK = np.asarray(routing.expert_TK)  # waits for the device
        wanted, num_experts = np.unique(expert_TK), self.plan.moe.num_experts
        rounds = self._slots[layer].rounds(wanted[wanted < num_experts])
        # By shape, not by how many were chosen: each shape then compiles the first time that it
        # occurs, and never after.
        if min(expert_TK.size, num_experts) <= self.size:
            slot_TK = self._bring(layer, usage, rounds[0])[expert_TK]
            return parts.whole(weights, self._banks[layer], x_BSD, h_TD, routing.weight_TK, slot_TK)
        row_MD = jnp.zeros((expert_TK.size, h_TD.shape[-1]), h_TD.dtype, device=self._on_device)
        for group in rounds:
            slot_TK = self._bring(layer, usage, group)[expert_TK]
            row_MD = parts.add(weights, self._banks[layer], h_TD, slot_TK, row_MD)
        return parts.join(weights, self._banks[layer], x_BSD, h_TD, routing.weight_TK, row_MD)

    def _bring(self, layer: int, usage: Usage, experts: np.ndarray) -> np.ndarray:
        """Has the device hold these experts of a layer; the slot of each expert, as
        `ExpertCache.table` gives it.
        """
        slots = self._slots[layer]
        missing = slots.admit(experts)
        for expert, slot in missing:
            one = jax.device_put(self.weights.experts[layer][expert], self._on_device)
            self._banks[layer] = self._put(self._banks[layer], one, np.int32(slot))
        usage.hits_L[layer] += len(experts) - len(missing)
        usage.misses_L[layer] += len(missing)
        return slots.table(experts)


# Compiled functions. Each runs on the one device as `ResidentEngine`'s do: the mesh's axes have
# names, and nothing tracks which values vary.


def _compile_model(plan: ServingPlan) -> tuple[list[Layer], Ends]:
    """The parts of all layers, and those before and after them."""
    abstract = nested({path: weight.abstract() for path, weight in plan.weights.items()})
    transformer = nnx.merge(plan.graph, abstract)
    layers: list[Layer] = []
    moe_layers = 0
    for i, (kinds, repeats) in enumerate(stack_layers(layer_kinds(plan.model, plan.moe))):
        graphs = [nnx.split(block)[0] for block in transformer.stacks[i].blocks]
        parts = [
            _compile_moe_layer(plan, graph) if kind.moe else _compile_dense_layer(plan, graph)
            for kind, graph in zip(kinds, graphs, strict=True)
        ]
        for repeat in range(repeats):
            for j, kind in enumerate(kinds):
                layers.append(Layer(i, j, np.int32(repeat), moe_layers, parts[j]))
                moe_layers += kind.moe
    transformer.stacks = nnx.List([])
    return layers, _compile_ends(plan, nnx.split(transformer)[0])


def _compile_ends(plan: ServingPlan, graph: Any) -> Ends:
    def embedded(params: Any, tokens_BS: Any) -> jax.Array:
        return embed(nnx.merge(graph, params).embedding, tokens_BS, plan.dtype)

    def logits(params: Any, x_BSD: Any, new: NewTokens) -> jax.Array:
        merged = nnx.merge(graph, params)
        return last_logits(merged, merged.final_norm(x_BSD), new)

    def every(params: Any, x_BSD: Any) -> jax.Array:
        merged = nnx.merge(graph, params)
        return all_logits(merged, merged.final_norm(x_BSD))

    def nats(params: Any, x_BSD: Any, targets_BS: Any, mask_BS: Any) -> Any:
        merged = nnx.merge(graph, params)
        return total_nats(merged, merged.final_norm(x_BSD), targets_BS, mask_BS)

    programs = (embedded, logits, every, nats)
    return Ends(*(compile_on(plan.mesh, local, P(), P()) for local in programs))


def _compile_dense_layer(plan: ServingPlan, graph: Any) -> LayerParts:
    """Each part takes a layer's parameters, the residual stream, new tokens, the cache of the
    layer's stack, and its number there.
    """

    def through(run: Any) -> Any:
        def local(params: Any, x_BSD: Any, new: NewTokens, cache: Any, repeat: Any) -> Any:
            return run(nnx.merge(graph, params), x_BSD, new, None, cache, repeat, 0, 1)

        return compile_on(plan.mesh, local, P(), P(), donated=(3,))

    return LayerParts(through(Block.prefill), through(Block.decode), None)


def _compile_moe_layer(plan: ServingPlan, graph: Any) -> LayerParts:
    """Each part takes a layer's parameters without its experts, and the bank that holds some of
    these.
    """

    def merged(params: Any, bank: Any) -> Any:
        return nnx.merge(graph, params | {"mlp": params["mlp"] | {"experts": bank}})

    def up_to_router(attend: Any) -> Any:
        def local(
            params: Any,
            bank: Any,
            bias_LE: Any,
            number: Any,
            x_BSD: Any,
            new: NewTokens,
            cache: Any,
            repeat: Any,
        ) -> Any:
            block = merged(params, bank)
            x_BSD, h_BSD, cache = attend(block, x_BSD, new, cache, repeat)
            routing = block.mlp.router.choose(h_BSD, new.valid, bias_LE[number])
            return x_BSD, h_BSD.reshape(-1, h_BSD.shape[-1]), routing, cache

        return compile_on(plan.mesh, local, P(), P(), donated=(6,))

    def add(params: Any, bank: Any, h_TD: Any, slot_TK: Any, row_MD: Any) -> Any:
        return row_MD + merged(params, bank).mlp.choice_rows(h_TD, slot_TK)

    def join(params: Any, bank: Any, x_BSD: Any, h_TD: Any, weight_TK: Any, row_MD: Any) -> Any:
        y_TD = merged(params, bank).mlp.join_choices(h_TD, row_MD, weight_TK)
        return x_BSD + y_TD.reshape(x_BSD.shape)

    def whole(params: Any, bank: Any, x_BSD: Any, h_TD: Any, weight_TK: Any, slot_TK: Any) -> Any:
        row_MD = merged(params, bank).mlp.choice_rows(h_TD, slot_TK)
        return join(params, bank, x_BSD, h_TD, weight_TK, row_MD)

    experts = ExpertParts(
        whole=compile_on(plan.mesh, whole, P(), P()),
        add=compile_on(plan.mesh, add, P(), P(), donated=(4,)),
        join=compile_on(plan.mesh, join, P(), P()),
    )
    return LayerParts(
        up_to_router(Block.prefill_attention), up_to_router(Block.decode_attention), experts
    )


def _put(bank: Any, weights: Any, slot: jax.Array) -> Any:
    """The bank with an expert in a slot."""
    return jax.tree.map(
        lambda a, new: lax.dynamic_update_index_in_dim(a, new, slot, 0), bank, weights
    )


def check_size(plan: ServingPlan, size: int) -> None:
    """Raises UserError where the plan's device cannot keep `size` experts per layer."""
    option, top_k = f"--expert-cache-size {size}", plan.moe.top_k
    if not count_moe_layers(plan.model, plan.moe):
        raise UserError(f"{option} is for models with experts and this one has none: leave it out.")
    if plan.mesh.size > 1:
        raise UserError(
            f"{option} is for one device and --mesh has {plan.mesh.size}: leave one of them out."
        )
    if size < top_k:
        raise UserError(
            f"{option} is less than the {top_k} experts that each token uses: give at least "
            f"{top_k}."
        )


def host_memory(device: jax.Device) -> str:
    """Where experts wait: memory that the device reads by itself (`pinned_host`), or numpy arrays:
    on CPU the former is only a copy.
    """
    kinds = {memory.kind for memory in device.addressable_memories()}
    return "pinned_host" if platform_of(device).reads_host and "pinned_host" in kinds else "numpy"


def offload(plan: ServingPlan, params: Any, tables: LayerTables, size: int) -> OffloadEngine:
    """An engine that keeps `size` experts per layer on its device; `params` are used up.

    Experts' weights may be numpy arrays, or arrays of any device, which are read back.
    """
    memory = host_memory(plan.mesh.devices.flat[0])
    sharding = None if memory == "numpy" else NamedSharding(plan.mesh, P(), memory_kind=memory)
    slots_LE = plan.placement.first_slot()
    layers: list[Any] = []
    experts: list[list[Any]] = []

    def one(bank: Any, repeat: int, slot: int) -> Any:
        weights = jax.tree.map(lambda a: a[repeat, slot], bank)
        return weights if sharding is None else jax.device_put(weights, sharding)

    for i, (kinds, repeats) in enumerate(stack_layers(layer_kinds(plan.model, plan.moe))):
        blocks = [params["stacks"][i]["blocks"][j] for j in range(len(kinds))]
        banks = [
            as_bits(jax.tree.map(np.asarray, block["mlp"].pop("experts")), plan.mesh)
            for block, kind in zip(blocks, kinds, strict=True)
            if kind.moe
        ]
        units = [_unstack(plan, block, repeats) for block in blocks]
        for repeat in range(repeats):
            layers += [unit[repeat] for unit in units]
            for bank in banks:
                experts.append([one(bank, repeat, slot) for slot in slots_LE[len(experts)]])
    ends = {name: value for name, value in params.items() if name != "stacks"}
    ends = as_bits(ends, plan.mesh)
    weights = OffloadedWeights(ends, layers, experts)
    return OffloadEngine(plan, weights, tables, min(size, plan.moe.num_experts), memory)


def _unstack(plan: ServingPlan, block: Any, repeats: int) -> list[Any]:
    """The parameters of each of a block's layers as programs take them, one array after another, so
    that few are in memory twice.
    """

    def cut(stacked: jax.Array) -> list[jax.Array]:
        held = as_bits(stacked, plan.mesh)
        parts = jax.block_until_ready(jax.jit(jnp.unstack)(held))
        for array in (held, stacked):
            array.delete()
        return list(parts)

    leaves, structure = jax.tree.flatten(block)
    cuts = [cut(leaf) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [parts[repeat] for parts in cuts])
        for repeat in range(repeats)
    ]
