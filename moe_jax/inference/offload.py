"""Inference on a device that cannot hold all experts: they stay in host memory, and the device
keeps those used last.

A layer runs in parts. Attention and the router run first; the numbers of the chosen experts come to
the host; those that the device lacks are copied over the least recently used (expert_cache.py);
then the experts run, each choice with the slot of its expert as data, so that nothing compiles
anew. Where more experts are chosen than there are slots, as in a prompt, the slots are filled in
rounds, and each choice's row is computed in one of them: the sums are those of the whole model.

# in the place of the engine and its parameters in a `LoadedModel`
offloaded, params = offload(engine, params, size=16)
offloaded.counts.hit_rate
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.errors import UserError
from moe_jax.inference.engine import Cache, Engine
from moe_jax.inference.expert_cache import Counts, ExpertCache
from moe_jax.models.batch import NewTokens
from moe_jax.models.embedding import embed
from moe_jax.models.layer_pattern import count_moe_layers, layer_kinds, stack_layers
from moe_jax.moe.router import Routing
from moe_jax.moe.tables import LayerTables
from moe_jax.runtime.platform import platform_of


class Parts(NamedTuple):
    """The compiled parts of layers of one kind; a layer without experts has `extend` alone. Those
    in dicts are by `fresh`.
    """

    extend: dict[bool, Any]
    attend: dict[bool, Any]
    whole: Any  # all experts' part, where one round is enough for any choice
    add: Any  # one of several rounds
    join: Any  # and what follows them


class Layer(NamedTuple):
    """Where a layer's cache is, and how it runs."""

    stack: int
    block: int
    repeat: Any  # i32 []
    number: int | None  # among layers with experts
    parts: Parts


class OffloadEngine:
    """What a `Session` and `evaluate` use of an `Engine`. Its slots outlive a sequence, and all
    sequences share them.
    """

    def __init__(self, engine: Engine, experts: list[list[Any]], size: int, host_memory: str):
        """`experts[layer][expert]` are weights in host memory, in logical order; `size` slots a
        layer begin empty.
        """
        self.engine, self.size, self.host_memory = engine, size, host_memory
        self.model, self.moe, self.mesh, self.placement = (
            engine.model,
            engine.moe,
            engine.mesh,
            engine.placement,
        )
        self.vocab_size, self.dtype = engine.vocab_size, engine.dtype
        # What has nothing to do with experts is the engine's own.
        self.new_cache, self.grow_cache = engine.new_cache, engine.grow_cache
        self.check_tokens, self.decode_bytes = engine.check_tokens, engine.decode_bytes
        self._experts, self._on_device = experts, NamedSharding(engine.mesh, P())

        def empty(a):
            return jnp.zeros((size, *a.shape), a.dtype, device=self._on_device)

        self._banks = [jax.tree.map(empty, layer[0]) for layer in experts]
        self._slots = [ExpertCache(engine.moe.num_experts, size) for _ in experts]
        self._asked = np.zeros(
            (2, len(experts), 2), np.int64
        )  # reading or decoding, layer, hits or misses
        self._tokens = [0, 0]
        self._compile_parts()

    # Figures

    @property
    def counts(self) -> Counts:
        """Of all tokens since the model was opened."""
        return self._count(slice(None))

    @property
    def decode_counts(self) -> Counts:
        """Of those that came one by one."""
        return self._count(slice(1, 2))

    def figures(self) -> dict[str, Any]:
        """Both, as `moe-jax bench` shows them."""
        every, decoding = self.counts, self.decode_counts
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

    def _count(self, which: slice) -> Counts:
        hits_L, misses_L = self._asked[which].sum(0).T
        one = sum(array.nbytes for array in jax.tree.leaves(self._experts[0][0]))
        return Counts(sum(self._tokens[which]), hits_L, misses_L, misses_L * one)

    # What `Session` and `evaluate` call

    def extend(
        self,
        params: Any,
        tables: LayerTables,
        cache: Cache,
        turn: NewTokens,
        *,
        fresh: bool = False,
    ) -> tuple[jax.Array, Cache]:
        """As `Engine.extend`."""
        x_BSD, cache = self._run(params, tables, cache, turn, fresh)
        return self._last_logits(params["ends"], x_BSD, turn), cache

    def score(
        self, params: Any, tables: LayerTables, tokens_BS: Any, targets_BS: Any, mask_BS: Any
    ) -> tuple[float, float]:
        """As `Engine.score`."""
        self.check_tokens(int(max(np.max(tokens_BS, initial=0), np.max(targets_BS, initial=0))))
        rows, length = np.shape(tokens_BS)
        turn = NewTokens(
            jnp.asarray(tokens_BS, jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.full(rows, length, jnp.int32),
        )
        x_BSD, _ = self._run(params, tables, self.new_cache(rows, length), turn, True)
        nats, count = self._nats(
            params["ends"], x_BSD, np.asarray(targets_BS, np.int32), np.asarray(mask_BS, np.float32)
        )
        return float(nats), float(count)

    def _run(
        self, params: Any, tables: LayerTables, cache: Cache, turn: NewTokens, fresh: bool
    ) -> tuple[jax.Array, Cache]:
        """New tokens through all layers."""
        x_BSD, cache = self._embed(params["ends"], turn.tokens), [list(stack) for stack in cache]
        decoding = int(turn.tokens.shape[1] == 1)
        self._tokens[decoding] += int(np.sum(turn.length))
        for layer, block in zip(self._layers, params["layers"], strict=True):
            stored = cache[layer.stack][layer.block]
            if layer.number is None:
                x_BSD, stored = layer.parts.extend[fresh](block, x_BSD, turn, stored, layer.repeat)
            else:
                args = (block, self._banks[layer.number], tables.bias_E, np.int32(layer.number))
                x_BSD, h_TD, routing, stored = layer.parts.attend[fresh](
                    *args, x_BSD, turn, stored, layer.repeat
                )
                x_BSD = self._run_experts(
                    layer.parts, layer.number, decoding, block, x_BSD, h_TD, routing
                )
            cache[layer.stack][layer.block] = stored
        return x_BSD, cache

    def _run_experts(
        self,
        parts: Parts,
        layer: int,
        decoding: int,
        block: Any,
        x_BSD: Any,
        h_TD: Any,
        routing: Routing,
    ) -> jax.Array:
        """The residual stream behind a layer's experts."""
        expert_TK = np.asarray(routing.expert_TK)  # waits for the device
        wanted = np.unique(expert_TK)
        rounds = self._slots[layer].rounds(wanted[wanted < self.moe.num_experts])
        # By shape, not by how many were chosen: each shape then compiles the first time that it
        # occurs, and never after.
        if min(expert_TK.size, self.moe.num_experts) <= self.size:
            slot_TK = self._bring(layer, decoding, rounds[0])[expert_TK]
            return parts.whole(block, self._banks[layer], x_BSD, h_TD, routing.weight_TK, slot_TK)
        row_MD = jnp.zeros((expert_TK.size, h_TD.shape[-1]), h_TD.dtype, device=self._on_device)
        for group in rounds:
            slot_TK = self._bring(layer, decoding, group)[expert_TK]
            row_MD = parts.add(block, self._banks[layer], h_TD, slot_TK, row_MD)
        return parts.join(block, self._banks[layer], x_BSD, h_TD, routing.weight_TK, row_MD)

    def _bring(self, layer: int, decoding: int, experts: np.ndarray) -> np.ndarray:
        """Has the device hold these experts of a layer; the slot of each expert, as
        `ExpertCache.table` gives it.
        """
        slots = self._slots[layer]
        missing = slots.admit(experts)
        for expert, slot in missing:
            weights = jax.device_put(self._experts[layer][expert], self._on_device)
            self._banks[layer] = self._put(self._banks[layer], weights, np.int32(slot))
        self._asked[decoding, layer] += (len(experts) - len(missing), len(missing))
        return slots.table(experts)

    # Compiled functions

    def _compile_parts(self) -> None:
        abstract = self.engine.tree(
            {path: leaf.abstract() for path, leaf in self.engine.plans.items()}
        )
        transformer = nnx.merge(self.engine.graph, abstract)
        self._layers: list[Layer] = []
        for i, (kinds, repeats) in enumerate(stack_layers(layer_kinds(self.model, self.moe))):
            parts = [
                self._compile_block(nnx.split(block)[0]) for block in transformer.stacks[i].blocks
            ]
            for repeat in range(repeats):
                for j, kind in enumerate(kinds):
                    number = (
                        sum(layer.number is not None for layer in self._layers)
                        if kind.moe
                        else None
                    )
                    self._layers.append(Layer(i, j, np.int32(repeat), number, parts[j]))
        transformer.stacks = nnx.List([])
        ends = nnx.split(transformer)[0]

        def normed(params: Any, x_BSD: jax.Array) -> tuple[Any, jax.Array]:
            merged = nnx.merge(ends, params)
            return merged, merged.final_norm(x_BSD)

        self._embed = self._jit(
            lambda params, tokens_BS: embed(
                nnx.merge(ends, params).embedding, tokens_BS, self.dtype
            )
        )
        self._last_logits = self._jit(
            lambda params, x_BSD, turn: self.engine.last_logits(*normed(params, x_BSD), turn)
        )
        self._nats = self._jit(
            lambda params, x_BSD, targets, mask: self.engine.nats(
                *normed(params, x_BSD), targets, mask
            )
        )
        self._put = self._jit(_put, donated=(0,))

    def _compile_block(self, graph: Any) -> Parts:
        """The parts of layers with this graph; each takes a layer's parameters, and its bank where
        they lack the experts.
        """

        def merged(block: Any, bank: Any) -> Any:
            return nnx.merge(graph, block | {"mlp": block["mlp"] | {"experts": bank}})

        def extend(
            block: Any, x_BSD: Any, turn: NewTokens, cache: Any, repeat: Any, *, fresh: bool
        ) -> Any:
            return nnx.merge(graph, block).extend(
                x_BSD, turn, None, cache, repeat, repeats=1, fresh=fresh
            )

        def attend(
            block: Any,
            bank: Any,
            bias_LE: Any,
            number: Any,
            x_BSD: Any,
            turn: NewTokens,
            cache: Any,
            repeat: Any,
            *,
            fresh: bool,
        ) -> Any:
            layer = merged(block, bank)
            x_BSD, h_BSD, cache = layer.attend(x_BSD, turn, cache, repeat, fresh=fresh)
            routing = layer.mlp.router.choose(h_BSD, turn.valid, bias_LE[number])
            return x_BSD, h_BSD.reshape(-1, h_BSD.shape[-1]), routing, cache

        def add(block: Any, bank: Any, h_TD: Any, slot_TK: Any, row_MD: Any) -> Any:
            return row_MD + merged(block, bank).mlp.choice_rows(h_TD, slot_TK)

        def join(block: Any, bank: Any, x_BSD: Any, h_TD: Any, weight_TK: Any, row_MD: Any) -> Any:
            return x_BSD + merged(block, bank).mlp.join_choices(h_TD, row_MD, weight_TK).reshape(
                x_BSD.shape
            )

        def whole(
            block: Any, bank: Any, x_BSD: Any, h_TD: Any, weight_TK: Any, slot_TK: Any
        ) -> Any:
            row_MD = merged(block, bank).mlp.choice_rows(h_TD, slot_TK)
            return join(block, bank, x_BSD, h_TD, weight_TK, row_MD)

        return Parts(
            extend={
                fresh: self._jit(partial(extend, fresh=fresh), donated=(3,))
                for fresh in (False, True)
            },
            attend={
                fresh: self._jit(partial(attend, fresh=fresh), donated=(6,))
                for fresh in (False, True)
            },
            whole=self._jit(whole),
            add=self._jit(add, donated=(4,)),
            join=self._jit(join),
        )

    def _jit(self, local: Any, donated: tuple[int, ...] = ()) -> Any:
        """A function of the one device, compiled as `Engine` compiles: the mesh's axes have names,
        and nothing tracks who varies.
        """
        alone = jax.shard_map(
            local, mesh=self.mesh, in_specs=P(), out_specs=P(), check_vma=self.mesh.size > 1
        )
        return jax.jit(
            alone, donate_argnums=donated if platform_of(self.mesh.devices.flat[0]).donates else ()
        )


def _put(bank: Any, weights: Any, slot: jax.Array) -> Any:
    """The bank with an expert in a slot."""
    return jax.tree.map(
        lambda a, new: lax.dynamic_update_index_in_dim(a, new, slot, 0), bank, weights
    )


def check_size(engine: Engine, size: int) -> None:
    """Raises UserError where `size` experts a layer cannot be what the engine's device keeps."""
    option, top_k = f"--expert-cache-size {size}", engine.moe.top_k
    if not count_moe_layers(engine.model, engine.moe):
        raise UserError(f"{option} is for models with experts and this one has none: leave it out.")
    if engine.mesh.size > 1:
        raise UserError(
            f"{option} is for one device and --mesh has {engine.mesh.size}: leave one of them out."
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


def offload(engine: Engine, params: Any, size: int) -> tuple[OffloadEngine, Any]:
    """An engine that keeps `size` experts a layer on its device, and the parameters that it takes;
    those given are used up.

    Experts' weights may be numpy arrays, or arrays of any device, which are read back.
    """
    memory = host_memory(engine.mesh.devices.flat[0])
    sharding = None if memory == "numpy" else NamedSharding(engine.mesh, P(), memory_kind=memory)
    slots_LE = engine.placement.first_slot()
    layers: list[Any] = []
    experts: list[list[Any]] = []

    def one(bank: Any, repeat: int, slot: int) -> Any:
        weights = jax.tree.map(lambda a: a[repeat, slot], bank)
        return weights if sharding is None else jax.device_put(weights, sharding)

    for i, (kinds, repeats) in enumerate(stack_layers(layer_kinds(engine.model, engine.moe))):
        blocks = [params["stacks"][i]["blocks"][j] for j in range(len(kinds))]
        banks = [
            jax.tree.map(np.asarray, block["mlp"].pop("experts"))
            for block, kind in zip(blocks, kinds, strict=True)
            if kind.moe
        ]
        units = [_unstack(block, repeats) for block in blocks]
        for repeat in range(repeats):
            layers += [unit[repeat] for unit in units]
            for bank in banks:
                experts.append([one(bank, repeat, slot) for slot in slots_LE[len(experts)]])
    ends = {name: value for name, value in params.items() if name != "stacks"}
    size = min(size, engine.moe.num_experts)
    return OffloadEngine(engine, experts, size, memory), {"ends": ends, "layers": layers}


def _unstack(block: Any, repeats: int) -> list[Any]:
    """The parameters of each of a block's layers, one array after another, so that few are in
    memory twice.
    """

    def cut(stacked: jax.Array) -> list[jax.Array]:
        parts = jax.block_until_ready(jax.jit(jnp.unstack)(stacked))
        stacked.delete()
        return list(parts)

    leaves, structure = jax.tree.flatten(block)
    cuts = [cut(leaf) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [parts[repeat] for parts in cuts])
        for repeat in range(repeats)
    ]
