"""Moving experts, with their optimizer moments, between slots while training goes on.

    migration = Migration(program)
    state, moved = migration(state, old, new)        # the old state's memory is used again

One compiled program does every migration (placement/moves.py schedules its calls): what moves is
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
from moe_jax.moe.slots import EXPERT_PATH, take_slots
from moe_jax.parallel.collectives import vma
from moe_jax.placement.schedule import NOTHING, Call, moves_between, schedule
from moe_jax.placement.table import EMPTY, Placement, slot_sources
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram

BUDGET_BYTES = 256 << 20  # a device's copies in a call, at least those of one layer


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
        shapes, specs = (
            _by_path(tree) for tree in (program.abstract_state, program.state_shardings)
        )
        slots = program.placement.num_slots
        found = {
            path: (leaf, specs[path].spec)
            for path, leaf in shapes.items()
            if EXPERT_PATH.search(path) and leaf.ndim > 1
        }
        self.paths = {path: spec for path, (_, spec) in found.items() if "expert" in spec}
        self.whole = sorted(
            found.keys() - self.paths.keys()
        )  # small factored moments, which every device holds whole
        block = next((EXPERT_PATH.search(path) for path in found), None)
        first = [
            leaf for path, (leaf, _) in found.items() if block is not None and block[0] in path
        ]
        self.expert_bytes = sum(
            leaf.size // (leaf.shape[0] * slots) * leaf.dtype.itemsize for leaf in first
        )  # of one layer's
        self.bytes_a_turn = self.expert_bytes // (
            program.mesh.shape["data"] * program.mesh.shape["tensor"]
        )  # that a device sends
        share = slots // program.placement.ranks
        self.budget = max(share, min(4 * share, BUDGET_BYTES // max(self.bytes_a_turn, 1)))
        layers = expert_layers(program.model, program.moe)
        count = sum(map(len, layers.values()))
        self.blocks = list(layers)
        self.block_L, self.repeat_L = np.zeros(count, np.int32), np.zeros(count, np.int32)
        for number, rows in enumerate(layers.values()):
            self.block_L[rows], self.repeat_L[rows] = number, np.arange(len(rows))
        self.run = self._compile()

    def bytes_between(self, old: Placement, new: Placement) -> int:
        """Bytes of the experts that change device between two tables."""
        share = old.num_slots // old.ranks
        moves = moves_between(old, new)
        return int(np.sum(moves[:, 1] // share != moves[:, 2] // share)) * self.expert_bytes

    def __call__(
        self, state: TrainState, old: Placement, new: Placement
    ) -> tuple[TrainState, Moved]:
        """The state with its experts where `new` says, `old` being where they are; waits until they
        are there.
        """
        leaves = _by_path(state)
        banks = {path: leaves[path] for path in self.paths}
        calls = schedule(old, new, self.budget)
        if calls and not self.compiled:
            banks = jax.block_until_ready(
                self.run(banks, calls[0]._replace(turns=np.array(0, np.int32)))
            )
            self.compiled = True
        began = time.perf_counter()
        for call in calls:
            banks = jax.block_until_ready(self.run(banks, call))
        sources_LP = slot_sources(old, new)
        sources_LP = np.where(
            sources_LP == EMPTY, np.arange(new.num_slots), sources_LP
        )  # what becomes empty keeps what it has
        for path in self.whole:
            rows = self.block_L == self._block(path)
            banks[path] = jax.device_put(
                take_slots(leaves[path], sources_LP[rows]), leaves[path].sharding
            )
        state = jax.tree.map_with_path(lambda path, leaf: banks.get(_text(path), leaf), state)
        state = self.program.with_tables(state, new)
        turns = sum(int(np.count_nonzero(call.shift_I)) for call in calls)
        jax.block_until_ready(state)
        return state, Moved(
            len(moves_between(old, new)),
            self.bytes_between(old, new),
            turns,
            len(calls),
            time.perf_counter() - began,
        )

    def _block(self, path: str) -> int:
        """The number of the block that an expert's array belongs to."""
        match = EXPERT_PATH.search(path)
        assert match is not None
        return self.blocks.index((int(match[1]), int(match[2])))

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


def _text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_path(tree: Any) -> dict[str, Any]:
    return {_text(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
