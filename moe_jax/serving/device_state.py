"""Everything of a serving engine that is on the devices, and the programs over it.

    state = DeviceState(loaded, EngineSize(max_batch=32, context=4096))
    state.begin(3, request, draw_kind(request))        # slot 3 is taken
    state.read_prompt(tokens, start=0)               # one chunk of a prompt, by itself
    state.move_to_slot(3, length)                    # the prompt's keys and values, and its logits
    state.decode(tokens, starts, lengths)            # one token of every slot
    tokens = state.draw(kinds, drawn, allowed)

A prompt is read into a cache of one row, in chunks at fixed places of a fixed few widths, and then
copied to its slot; decoding always runs over all slots. The shapes that a request goes through are
thereby its own, whatever else is there, and no row's numbers depend on those of another: what it
says does not either.

Every method takes values of the host alone. Several processes that call the same ones in the same
order hold the same state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.errors import UserError
from moe_jax.inference.engine import ResidentEngine, compile_on
from moe_jax.inference.kv_cache import STEP, Cache, CacheLayout, bucket
from moe_jax.inference.session import SHORTEST_PROMPT, LoadedModel
from moe_jax.models.batch import LayerCache, NewTokens
from moe_jax.ops.attention.cached import place_dim
from moe_jax.placement.table import Placement
from moe_jax.profiling.memory import per_device
from moe_jax.runtime.platform import default_platform
from moe_jax.serving.request import Request
from moe_jax.serving.row_sampling import DrawKind, RowSampler


@dataclass(frozen=True)
class EngineSize:
    """How much an engine holds. Raises UserError for what cannot be."""

    max_batch: int
    """Requests that run at once: slots of the cache."""
    context: int
    """Tokens of a request, those of its prompt and of its answer together."""
    chunk: int = 128
    """Tokens of a prompt that are read between two steps, and of a block of the prefix cache."""
    prefix_blocks: int | None = None
    """Blocks of prompts that are kept; by default a quarter of what the slots hold."""
    balance_every: int | None = None
    """Steps between two plans of where experts are; None: they stay where they are."""

    def __post_init__(self) -> None:
        for name, value in (("--max-batch", self.max_batch), ("--max-context", self.context)):
            if value < 1:
                raise UserError(f"{name} {value} must be at least 1.")
        if STEP % self.chunk or self.chunk < SHORTEST_PROMPT:
            raise ValueError(f"a chunk of {self.chunk} tokens does not divide {STEP}")

    @property
    def places(self) -> int:
        """Places of a slot: whole steps of the cache."""
        return -(-self.context // STEP) * STEP

    @property
    def blocks(self) -> int:
        """Blocks of the prefix cache."""
        if self.prefix_blocks is not None:
            return self.prefix_blocks
        return self.max_batch * self.places // self.chunk // 4


def cache_bytes(layout: CacheLayout, size: EngineSize) -> int:
    """Bytes of keys and values on each device: of all slots, of the prompt under way, and of the
    blocks of prompts that are kept.
    """
    shapes = [(size.max_batch, size.places), (1, size.places), (size.blocks, size.chunk)]
    abstract = [layout.abstract(*shape) for shape in shapes]
    return per_device(abstract, jax.tree.map(lambda array: array.sharding, abstract))


class DeviceState:
    """Caches, logits and the state of sampling; see above."""

    def __init__(self, loaded: LoadedModel, size: EngineSize):
        """Raises UserError where the model's mesh or its positions cannot be served."""
        _check_model(loaded, size)
        self.size, self._engine = size, loaded.engine
        self.move_budget = 0
        """Experts that a device sends in one call at most; 0 where they stay."""
        if size.balance_every is not None:
            assert isinstance(loaded.engine, ResidentEngine)  # room.check_moves has looked
            self.move_budget = loaded.engine.let_experts_move()
        plan, layout = loaded.engine.plan, loaded.engine.layout
        self._slots = layout.new(size.max_batch, size.places)
        self._reading = layout.new(1, size.places)
        self._blocks = layout.new(size.blocks, size.chunk) if size.blocks else None
        everywhere = NamedSharding(plan.mesh, P())
        donated = (0,) if default_platform().donates else ()
        self.sampler = RowSampler(size.max_batch, num_ids(loaded), everywhere)
        self._copy = compile_on(
            plan.mesh,
            partial(copy_places, size.chunk),
            (layout.specs, layout.specs, P()),
            layout.specs,
            donated=(1,),
        )
        self._insert = jax.jit(insert_rows, donate_argnums=donated, out_shardings=everywhere)
        self.forget_counts()
        self._row = jax.jit(lax.dynamic_index_in_dim, out_shardings=everywhere)
        self._prompt_logits_1V: Any = None
        self._logits_SV: Any = jnp.zeros(
            (size.max_batch, plan.vocab_size), jnp.float32, device=everywhere
        )

    def forget_counts(self) -> None:
        """Counts choices of experts from now on."""
        if isinstance(self._engine, ResidentEngine):
            self._engine.count_choices()

    def expert_counts(self) -> np.ndarray | None:
        """Choices that went to each slot, i64 [MoE layers, P], of prompts and answers, since the
        start or the last move; None where they are not counted: of a model without experts, or with
        a part of them in host memory. It waits for the devices.
        """
        return self._engine.choices() if isinstance(self._engine, ResidentEngine) else None

    @property
    def placement(self) -> Placement | None:
        """Where experts are; None where their choices are not counted."""
        return self._engine.placement if isinstance(self._engine, ResidentEngine) else None

    def move_experts(self, slots_LP: np.ndarray) -> None:
        """Brings experts to these slots, and counts from there on."""
        assert isinstance(self._engine, ResidentEngine)
        now = self._engine.placement
        self._engine.move_experts(Placement(slots_LP, now.num_experts, now.ranks))

    def begin(self, slot: int, request: Request, kind: DrawKind) -> None:
        """A request of this kind takes a slot."""
        self.sampler.begin(slot, request, kind)

    def read_prompt(self, tokens: Sequence[int], start: int) -> None:
        """Reads tokens, a chunk at most, behind the first `start` of the prompt under way."""
        width = bucket(len(tokens), SHORTEST_PROMPT)
        tokens_1S = np.zeros((1, width), np.int32)
        tokens_1S[0, : len(tokens)] = tokens
        counts = (np.array([count], np.int32) for count in (start, len(tokens)))
        new = NewTokens(*map(jnp.asarray, (tokens_1S, *counts)))
        self._prompt_logits_1V, self._reading = self._engine.decode(self._reading, new)

    def fetch_block(self, number: int, part: int) -> None:
        """Block `number` of the prefix cache becomes part `part` of the prompt under way."""
        assert self._blocks is not None
        self._reading = self._copy(self._blocks, self._reading, _at(number, 0, 0, part, 1))

    def keep_block(self, number: int, part: int) -> None:
        """Part `part` of the prompt under way becomes block `number` of the prefix cache."""
        assert self._blocks is not None
        self._blocks = self._copy(self._reading, self._blocks, _at(0, part, number, 0, 1))

    def move_to_slot(self, slot: int, length: int) -> None:
        """The prompt under way, of `length` tokens, becomes that of a slot, and the logits after it
        the slot's.
        """
        blocks = -(-length // self.size.chunk)
        self._slots = self._copy(self._reading, self._slots, _at(0, 0, slot, 0, blocks))
        self._logits_SV = self._insert(self._logits_SV, self._prompt_logits_1V, np.int32(slot))

    def decode(self, token_S: np.ndarray, start_S: np.ndarray, length_S: np.ndarray) -> None:
        """One more token of every slot with length 1, of those with length 0 none, of the first
        slots, as many as there are numbers. Logits of those with length 0 mean nothing afterwards.
        """
        new = NewTokens(*map(jnp.asarray, (token_S[:, None], start_S, length_S)))
        logits_SV, self._slots = self._engine.decode(self._slots, new)
        self._logits_SV = self._insert(self._logits_SV, logits_SV, np.int32(0))

    def row_logits(self, slot: int) -> np.ndarray:
        """A slot's logits, f32 [V]."""
        return np.asarray(self._row(self._logits_SV, np.int32(slot)))[0]

    def draw(
        self, kinds: dict[int, DrawKind], drawn_S: np.ndarray, allowed: dict[int, np.ndarray]
    ) -> np.ndarray:
        """As `RowSampler.draw`."""
        return self.sampler.draw(self._logits_SV, kinds, drawn_S, allowed)

    def top(self, token_S: np.ndarray) -> tuple[np.ndarray, ...]:
        """As `RowSampler.top`."""
        return self.sampler.top(self._logits_SV, token_S)


def num_ids(loaded: LoadedModel) -> int:
    """Tokens that can be drawn: ids after them pad the vocabulary."""
    return min(loaded.tokenizer.num_ids, loaded.engine.plan.vocab_size)


def copy_places(chunk: int, source: Cache, target: Cache, at: Any) -> Cache:
    """The target with blocks of `chunk` places of a row of the source; `at` is what `_at` makes."""
    source_row, source_block, target_row, target_block, blocks = at

    def copy(source: jax.Array | None, target: jax.Array | None, dim: int) -> Any:
        if source is None or target is None:
            return None
        size = list(source.shape)
        size[1], size[dim] = 1, chunk

        def one(i: jax.Array, target: jax.Array) -> jax.Array:
            def starts(row: jax.Array, block: jax.Array) -> list[Any]:
                place = (block + i) * chunk
                zero = jnp.int32(0)
                return [row if d == 1 else place if d == dim else zero for d in range(len(size))]

            part = lax.dynamic_slice(source, starts(source_row, source_block), size)
            return lax.dynamic_update_slice(target, part, starts(target_row, target_block))

        return lax.fori_loop(0, blocks, one, target)

    return [
        [
            LayerCache(copy(old.keys, new.keys, place_dim()), copy(old.values, new.values, 3))
            for old, new in zip(old_stack, new_stack, strict=True)
        ]
        for old_stack, new_stack in zip(source, target, strict=True)
    ]


def insert_rows(logits_SV: jax.Array, new_NV: jax.Array, row: jax.Array) -> jax.Array:
    """The logits with new ones from a row on."""
    return lax.dynamic_update_slice_in_dim(logits_SV, new_NV, row, 0)


def _at(
    source_row: int, source_block: int, target_row: int, target_block: int, blocks: int
) -> tuple[np.int32, ...]:
    """From where to where `copy_places` copies."""
    return tuple(map(np.int32, (source_row, source_block, target_row, target_block, blocks)))


def _check_model(loaded: LoadedModel, size: EngineSize) -> None:
    plan = loaded.engine.plan
    if plan.mesh.shape["data"] > 1:
        raise UserError(
            f"--mesh with data={plan.mesh.shape['data']} cannot be served: use expert and tensor, "
            f"or start a server for each copy of the model."
        )
    if size.context > loaded.context:
        raise UserError(
            f"--max-context {size.context} exceeds the context of {loaded.context} tokens of "
            f"{loaded.name}: give at most that."
        )
    rope = plan.model.rope
    if rope.scaling == "dynamic" and size.context > rope.original_length:
        raise UserError(
            f"--max-context {size.context}: beyond {rope.original_length} tokens the positions of "
            f"{loaded.name} depend on the longest text that is read with it (rope scaling dynamic),"
            f" so a server cannot keep requests apart: use --max-context {rope.original_length}."
        )
