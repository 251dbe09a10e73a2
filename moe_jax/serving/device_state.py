"""Everything of a serving engine that is on the devices, and the programs over it.

    state = DeviceState(loaded, EngineSize(max_batch=32, context=4096))
    state.begin(3, request, draw_kind(request))      # slot 3 is taken
    state.place(3, False, part=0, block=7)           # where its first keys and values go
    state.read_prompt(3, tokens, start=0)            # one chunk of a prompt, by itself
    state.decode(tokens, starts, lengths)            # one token of every slot
    tokens = state.draw(kinds, drawn, allowed)
    state.vacate(3)

A prompt is read by itself, in chunks at fixed places of a fixed few widths; decoding always runs
over all slots. The shapes that a request goes through are thereby its own, whatever else is there,
and no row's numbers depend on those of another: what it says does not either. Keys and values lie
in blocks that all rows share; which of them a row has (cache_blocks.py) changes no number.

Every method takes values of the host alone. Several processes that call the same ones in the same
order hold the same state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.errors import UserError
from moe_jax.inference.engine import ResidentEngine
from moe_jax.inference.kv_cache import BlockCounts, CacheLayout, bucket
from moe_jax.inference.session import SHORTEST_PROMPT, LoadedModel
from moe_jax.models.batch import BlockTables, NewTokens
from moe_jax.models.layer_pattern import layer_kinds
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.placement.table import Placement
from moe_jax.profiling.memory import per_device
from moe_jax.runtime.platform import default_platform
from moe_jax.serving.engine_size import EngineSize, check_served
from moe_jax.serving.request import Request
from moe_jax.serving.row_sampling import DrawKind, RowSampler


class CacheKinds(NamedTuple):
    """Which kinds of layers a model has."""

    full: bool
    """Layers that see everything."""
    window: int | None
    """What the others see, in tokens; None where there are none."""


def cache_kinds(plan: ServingPlan) -> CacheKinds:
    """Those of a model."""
    windows = {kind.window for kind in layer_kinds(plan.model, plan.moe)}
    window = next((window for window in windows if window is not None), None)
    return CacheKinds(None in windows, window)


def block_counts(plan: ServingPlan, size: EngineSize) -> BlockCounts:
    """Blocks of an engine's cache."""
    full, window = cache_kinds(plan)
    windowed = 0 if window is None else size.window_blocks(window)
    return BlockCounts(size.full_blocks if full else 0, windowed)


def cache_bytes(plan: ServingPlan, size: EngineSize) -> int:
    """Bytes of keys and values on each device."""
    abstract = CacheLayout(plan).abstract(block_counts(plan, size), size.block)
    return per_device(abstract, jax.tree.map(lambda array: array.sharding, abstract))


class DeviceState:
    """Caches, logits and the state of sampling; see above."""

    def __init__(self, loaded: LoadedModel, size: EngineSize):
        """Raises UserError where the model's mesh or its positions cannot be served."""
        check_served(loaded.engine.plan, size)
        if size.context > loaded.context:
            raise UserError(
                f"--max-context {size.context} exceeds the context of {loaded.context} tokens of "
                f"{loaded.name}: give at most that."
            )
        self.size, self._engine = size, loaded.engine
        self.move_budget = 0
        """Experts that a device sends in one call at most; 0 where they stay."""
        if size.balance_every is not None:
            assert isinstance(loaded.engine, ResidentEngine)  # room.check_moves has looked
            self.move_budget = loaded.engine.let_experts_move()
        plan, layout = loaded.engine.plan, loaded.engine.layout
        self._cache = layout.new(block_counts(plan, size), size.block)
        # Of layers without a window and with one; and those of the first slots, on the devices.
        self._tables = np.zeros((2, size.max_batch, size.parts), np.int32)
        self._tables_by_width: dict[int, list[jax.Array]] = {}
        everywhere = NamedSharding(plan.mesh, P())
        donated = (0,) if default_platform().donates else ()
        self.sampler = RowSampler(size.max_batch, num_ids(loaded), everywhere)
        self._insert = jax.jit(insert_rows, donate_argnums=donated, out_shardings=everywhere)
        self.forget_counts()
        self._row = jax.jit(lax.dynamic_index_in_dim, out_shardings=everywhere)
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

    def place(self, slot: int, windowed: bool, part: int, block: int) -> None:
        """Part `part` of a slot is a block, of the layers with a window or of the others."""
        self._tables[int(windowed), slot, part] = block
        self._tables_by_width.clear()

    def vacate(self, slot: int) -> None:
        """A slot is free: it has no blocks any more."""
        self._tables[:, slot] = 0
        self._tables_by_width.clear()

    def read_prompt(self, slot: int, tokens: Sequence[int], start: int) -> None:
        """Reads tokens, a chunk at most, behind the first `start` of a slot's prompt. The slot's
        logits are those after the last of them.
        """
        tokens_1S = np.zeros((1, bucket(len(tokens), SHORTEST_PROMPT)), np.int32)
        tokens_1S[0, : len(tokens)] = tokens
        tables = [table[slot : slot + 1].copy() for table in self._tables]
        start_1, length_1 = (np.array([count], np.int32) for count in (start, len(tokens)))
        self._run(tokens_1S, start_1, length_1, tables, slot)

    def decode(self, token_S: np.ndarray, start_S: np.ndarray, length_S: np.ndarray) -> None:
        """One more token of every slot with length 1, of those with length 0 none, of the first
        slots, as many as there are numbers. Logits of those with length 0 mean nothing afterwards.
        """
        width = len(token_S)
        if width not in self._tables_by_width:
            self._tables_by_width[width] = [jnp.array(table[:width]) for table in self._tables]
        tables = self._tables_by_width[width]
        self._run(token_S[:, None], start_S, length_S, tables, 0)

    def _run(
        self,
        tokens_NS: Any,
        start_N: Any,
        length_N: Any,
        tables: Sequence[Any],
        first: int,
    ) -> None:
        """New tokens through the model; their logits are those of the slots from `first` on."""
        tokens_NS, start_N, length_N, full, window = (
            jnp.asarray(array) for array in (tokens_NS, start_N, length_N, *tables)
        )
        new = NewTokens(tokens_NS, start_N, length_N, BlockTables(full, window))
        logits_NV, self._cache = self._engine.decode(self._cache, new)
        self._logits_SV = self._insert(self._logits_SV, logits_NV, np.int32(first))

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


def insert_rows(logits_SV: jax.Array, new_NV: jax.Array, row: jax.Array) -> jax.Array:
    """The logits with new ones from a row on."""
    return lax.dynamic_update_slice_in_dim(logits_SV, new_NV, row, 0)
