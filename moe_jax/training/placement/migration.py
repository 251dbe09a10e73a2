"""Moving experts, with their optimizer moments, between slots while training goes on.

    migration = Migration(program)
    state, moved = migration(state, migration.plan(old, new))  # reuses the old state's memory

The compiled program is that of moe/expert_moves.py.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_jax.models.layer_pattern import expert_layers
from moe_jax.models.paths import ParameterPath, by_path, path_of
from moe_jax.moe.expert_moves import ExpertBank, ExpertMoves, copies_per_call
from moe_jax.moe.slots import take_slots
from moe_jax.placement.schedule import MigrationPlan, plan_migration
from moe_jax.placement.table import EMPTY, Placement, slot_sources
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram


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
        self.layers = expert_layers(program.model, program.moe)
        self.paths, self.whole = _expert_arrays(program)
        self.costs = self._measure_costs()
        self.run = ExpertMoves(
            program.mesh,
            {path: ExpertBank(spec, tuple(self._rows(path))) for path, spec in self.paths.items()},
        ).run

    def _measure_costs(self) -> MigrationCosts:
        shapes = by_path(self.program.abstract_state)
        slots, mesh = self.program.placement.num_slots, self.program.mesh.shape
        first = next(iter(self.layers.values()), None)
        of_one_block = [
            shapes[path] for path in [*self.paths, *self.whole] if self._rows(path) == first
        ]
        expert_bytes = sum(
            leaf.size // (leaf.shape[0] * slots) * leaf.dtype.itemsize for leaf in of_one_block
        )
        per_turn = expert_bytes // (mesh["data"] * mesh["tensor"])
        share = slots // self.program.placement.ranks
        return MigrationCosts(expert_bytes, per_turn, copies_per_call(share, per_turn))

    def plan(self, old: Placement, new: Placement) -> MigrationPlan:
        """How to bring experts from where `old` has them to where `new` does."""
        return plan_migration(old, new, self.costs.budget)

    def __call__(self, state: TrainState, plan: MigrationPlan) -> tuple[TrainState, Moved]:
        """The state with its experts where the plan's new table says; they must be where its old
        one does. Waits until they are there.
        """
        leaves = by_path(state)
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
            rows = self._rows(path)
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

    def _rows(self, path: str) -> list[int]:
        """The MoE layers of an expert's array: rows of the table."""
        return self.layers[ParameterPath.parse(path).layer_block]


def _expert_arrays(program: TrainProgram) -> tuple[dict[str, P], list[str]]:
    """The paths of the experts' arrays, parameters and moments: those that are cut over the
    `expert` axis, with their specs, and the small factored moments that every device holds whole.
    """
    shardings = by_path(program.state_shardings)
    cut: dict[str, P] = {}
    whole: list[str] = []
    for path, leaf in by_path(program.abstract_state).items():
        if not ParameterPath.parse(path).is_expert or leaf.ndim < 2:
            continue
        if "expert" in shardings[path].spec:
            cut[path] = shardings[path].spec
        else:
            whole.append(path)
    return cut, sorted(whole)
