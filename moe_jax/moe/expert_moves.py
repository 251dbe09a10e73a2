"""The program that moves experts between slots: their weights in serving, weights with moments in
training.

    moves = ExpertMoves(mesh, {path: ExpertBank(spec, layers), ...})
    banks = moves.run(banks, call)          # the memory of the given banks is used again

One compiled program makes every call of a plan (placement/schedule.py): what moves is data. Each
turn sends one expert, all its arrays together, a number of ranks further by one collective permute
chosen among R - 1, so the links carry the experts that move and never the bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.collectives import vma
from moe_jax.placement.schedule import NOTHING, Call

BUDGET_BYTES = 256 << 20  # a device's copies in a call, at least those of one layer


class ExpertBank(NamedTuple):
    """One array of experts, [repeats, P, ...] and cut over `expert` along P."""

    spec: P
    layers: tuple[int, ...]
    """The MoE layer of each repeat: rows of a placement table. Banks with the same are of one
    block.
    """


def copies_per_call(share: int, bytes_per_copy: int) -> int:
    """Experts that a device with `share` slots per layer copies aside in a call."""
    return max(share, min(4 * share, BUDGET_BYTES // max(bytes_per_copy, 1)))


class ExpertMoves:
    """See above."""

    def __init__(self, mesh: Mesh, banks: Mapping[str, ExpertBank]):
        self._blocks = list(dict.fromkeys(bank.layers for bank in banks.values()))
        self._block_of = {path: self._blocks.index(bank.layers) for path, bank in banks.items()}
        count = sum(map(len, self._blocks))
        self._block_L, self._repeat_L = np.zeros((2, count), np.int32)
        for number, layers in enumerate(self._blocks):
            rows = list(layers)
            self._block_L[rows], self._repeat_L[rows] = number, np.arange(len(rows))
        specs = {path: bank.spec for path, bank in banks.items()}
        local = jax.shard_map(
            self._local,
            mesh=mesh,
            in_specs=(specs, Call._make(P() for _ in Call._fields)),
            out_specs=specs,
        )
        shardings = {path: NamedSharding(mesh, spec) for path, spec in specs.items()}
        self.run = jax.jit(local, donate_argnums=0, out_shardings=shardings)
        """(banks by path, call) -> the banks after it."""

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
            kind = kinds.setdefault((bank.dtype, vma(bank)), [[] for _ in self._blocks])
            kind[self._block_of[path]].append(path)
        return list(kinds.values())

    def _read(
        self, banks: dict[str, jax.Array], layer: jax.Array, slot: jax.Array
    ) -> list[jax.Array]:
        """All arrays of one expert, of each kind in one piece."""
        repeat, block = jnp.asarray(self._repeat_L)[layer], jnp.asarray(self._block_L)[layer]
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
        repeat, block = jnp.asarray(self._repeat_L)[layer], jnp.asarray(self._block_L)[layer]
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
