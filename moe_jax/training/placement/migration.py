"""Moving experts, with their optimizer moments, between slots while training goes on.

    migration = Migration(program)
    state, moved = migration(state, migration.plan(old, new))  # reuses the old state's memory

One compiled program does every migration (placement/schedule.py schedules its calls): what moves is
data. Each turn sends one expert, all its arrays together, a number of ranks further by one
collective permute chosen among R - 1, so the links carry the experts that move and never the bank.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.models.layer_pattern import expert_layers
from moe_jax.models.paths import ParameterPath, path_of
from moe_jax.moe.slots import take_slots
from moe_jax.parallel.collectives import vma
from moe_jax.placement.schedule import NOTHING, Call, MigrationPlan, plan_migration
from moe_jax.placement.table import EMPTY, Placement, slot_sources
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram

BUDGET_BYTES = 256 << 20  # a device's copies in a call, at least those of one layer


class MigrationCosts(NamedTuple):
    """What moving experts of a program costs."""

    expert_bytes: int  # one expert of one layer, with its moments
    bytes_per_turn: int  # that a device sends
    budget: int  # experts that a device copies aside per call


class Moved(NamedTuple):
    """What a migration did."""

    experts: int  # slots that got another expert
    bytes: int  # of the experts that changed device, with their moments, once each
    turns: int  # each sends one expert from every device, used or not, one after another
    calls: int
    seconds: float  # without the compilation that the first one waits for


class Migration:
    """Moves the experts of a program's states."""

    def __init__(self, program: TrainProgram):
        self.program, self.compiled = program, False
        layers = expert_layers(program.model, program.moe)
        self.blocks = list(layers)
        self.paths, self.whole = _expert_arrays(program)
        self.costs = self._measure_costs()
        count = sum(map(len, layers.values()))
        self.block_L, self.repeat_L = np.zeros(count, np.int32), np.zeros(count, np.int32)
        for number, rows in enumerate(layers.values()):
            self.block_L[rows], self.repeat_L[rows] = number, np.arange(len(rows))
        self.run = self._compile()

    def _measure_costs(self) -> MigrationCosts:
        shapes = _by_path(self.program.abstract_state)
        slots, mesh = self.program.placement.num_slots, self.program.mesh.shape
        of_one_block = [
            shapes[path] for path in [*self.paths, *self.whole] if self._block(path) == 0
        ]
        expert_bytes = sum(
            leaf.size // (leaf.shape[0] * slots) * leaf.dtype.itemsize for leaf in of_one_block
        )
        per_turn = expert_bytes // (mesh["data"] * mesh["tensor"])
        share = slots // self.program.placement.ranks
        budget = max(share, min(4 * share, BUDGET_BYTES // max(per_turn, 1)))
        return MigrationCosts(expert_bytes, per_turn, budget)

    def plan(self, old: Placement, new: Placement) -> MigrationPlan:
        """How to bring experts from where `old` has them to where `new` does."""
        return plan_migration(old, new, self.costs.budget)

    def __call__(self, state: TrainState, plan: MigrationPlan) -> tuple[TrainState, Moved]:
        """The state with its experts where the plan's new table says; they must be where its old
        one does. Waits until they are there.
        """
        leaves = _by_path(state)
        banks = {path: leaves[path] for path in self.paths}
        if plan.calls and not self.compiled:
            nothing = plan.calls[0]._replace(turns=np.array(0, np.int32))
            banks = jax.block_until_ready(self.run(banks, nothing))
            self.compiled = True
        began = time.perf_counter()
        for call in plan.calls:
            banks = jax.block_until_ready(self.run(banks, call))
        sources_LP = slot_sources(plan.old, plan.new)
        sources_LP = np.where(
            sources_LP == EMPTY, np.arange(plan.new.num_slots), sources_LP
        )  # what becomes empty keeps what it has
        for path in self.whole:
            rows = self.block_L == self._block(path)
            banks[path] = jax.device_put(
                take_slots(leaves[path], sources_LP[rows]), leaves[path].sharding
            )
        state = jax.tree.map_with_path(
            lambda keys, leaf: banks.get(path_of(keys).text, leaf), state
        )
        state = self.program.with_tables(state, plan.new)
        jax.block_until_ready(state)
        sent_turns = sum(int(np.count_nonzero(call.shift_I)) for call in plan.calls)
        return state, Moved(
            experts=len(plan.moves),
            bytes=plan.sent * self.costs.expert_bytes,
            turns=sent_turns,
            calls=len(plan.calls),
            seconds=time.perf_counter() - began,
        )

    def _block(self, path: str) -> int:
        """The number of the block that an expert's array belongs to."""
        return self.blocks.index(ParameterPath.parse(path).layer_block)

    def _compile(self):
        call_specs = Call._make(P() for _ in Call._fields)
        local = jax.shard_map(
            self._local,
            mesh=self.program.mesh,
            in_specs=(self.paths, call_specs),
            out_specs=self.paths,
        )
        shardings = {
            path: NamedSharding(self.program.mesh, spec) for path, spec in self.paths.items()
        }
        return jax.jit(local, donate_argnums=0, out_shardings=shardings)

    # Inside shard_map: every device's part.

    def _local(self, banks: dict[str, jax.Array], call: Call) -> dict[str, jax.Array]:
        rank, ranks = lax.axis_index("expert"), lax.axis_size("expert")
        copies = lax.map(
            lambda at: self._read(banks, at[0], at[1]),
            (call.send_layer_RG[rank], call.send_slot_RG[rank]),
        )
        sends: list[Any] = [
            lambda x: x,
            *(partial(_send, shift, ranks) for shift in range(1, ranks)),
        ]

        def turn(i: jax.Array, banks: dict[str, jax.Array]) -> dict[str, jax.Array]:
            mine = [copy[call.row_RI[rank, i]] for copy in copies]
            return self._write(
                banks,
                call.layer_RI[rank, i],
                call.slot_RI[rank, i],
                lax.switch(call.shift_I[i], sends, mine),
            )

        return lax.fori_loop(0, call.turns, turn, banks)

    def _kinds(self, banks: dict[str, jax.Array]) -> list[list[list[str]]]:
        """Paths whose experts travel in one piece, as they have one dtype and vary over the same
        axes: by kind and block.
        """
        kinds: dict[Any, list[list[str]]] = {}
        for path, bank in banks.items():
            kinds.setdefault((bank.dtype, vma(bank)), [[] for _ in self.blocks])[
                self._block(path)
            ].append(path)
        return list(kinds.values())

    def _read(
        self, banks: dict[str, jax.Array], layer: jax.Array, slot: jax.Array
    ) -> list[jax.Array]:
        """All arrays of one expert, of each kind in one piece."""
        repeat, block = jnp.asarray(self.repeat_L)[layer], jnp.asarray(self.block_L)[layer]
        pieces = []
        for kind in self._kinds(banks):
            rows = [
                jnp.concatenate(
                    [banks[path][_within(repeat, banks[path]), slot].reshape(-1) for path in paths]
                )
                for paths in kind
            ]
            piece = rows[0]
            for number, row in enumerate(rows[1:], 1):
                piece = jnp.where(block == number, row, piece)
            pieces.append(piece)
        return pieces

    def _write(
        self,
        banks: dict[str, jax.Array],
        layer: jax.Array,
        slot: jax.Array,
        pieces: list[jax.Array],
    ) -> dict[str, jax.Array]:
        """The banks with the expert in that place; as they were where the layer is NOTHING."""
        repeat, block = jnp.asarray(self.repeat_L)[layer], jnp.asarray(self.block_L)[layer]
        banks = dict(banks)
        for kind, piece in zip(self._kinds(banks), pieces, strict=True):
            for number, paths in enumerate(kind):
                here, at = (layer != NOTHING) & (block == number), 0
                for path in paths:
                    bank = banks[path]
                    place, size = (
                        (_within(repeat, bank), jnp.maximum(slot, 0)),
                        int(np.prod(bank.shape[2:])),
                    )
                    row = jnp.where(
                        here, piece[at : at + size].reshape(bank.shape[2:]), bank[place]
                    )
                    banks[path] = lax.dynamic_update_slice(
                        bank, row[None, None], (*place, *(0,) * row.ndim)
                    )
                    at += size
        return banks


def _send(shift: int, ranks: int, pieces: list[jax.Array]) -> list[jax.Array]:
    return [
        lax.ppermute(piece, "expert", [(rank, (rank + shift) % ranks) for rank in range(ranks)])
        for piece in pieces
    ]


def _within(repeat: jax.Array, bank: jax.Array) -> jax.Array:
    """The repeat, or the last one where the bank is of another block, which has fewer; it is not
    used then.
    """
    return jnp.clip(repeat, 0, bank.shape[0] - 1)


def _by_path(tree: Any) -> dict[str, Any]:
    return {path_of(keys).text: leaf for keys, leaf in jax.tree.leaves_with_path(tree)}


def _expert_arrays(program: TrainProgram) -> tuple[dict[str, P], list[str]]:
    """The paths of the experts' arrays, parameters and moments: those that are cut over the
    `expert` axis, with their specs, and the small factored moments that every device holds whole.
    """
    shardings = _by_path(program.state_shardings)
    cut: dict[str, P] = {}
    whole: list[str] = []
    for path, leaf in _by_path(program.abstract_state).items():
        if not ParameterPath.parse(path).is_expert or leaf.ndim < 2:
            continue
        if "expert" in shardings[path].spec:
            cut[path] = shardings[path].spec
        else:
            whole.append(path)
    return cut, sorted(whole)
