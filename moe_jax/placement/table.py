"""Placement tables: which slot of which device holds each expert. Plain numpy, checked on construction.

Weights live in slot order, [P, ...] sharded over the `expert` axis, so slot p is on rank p // (P/R). Routing
stays in logical order; a table translates. P can exceed the number of experts: the slots beyond are empty
(the axis does not divide the experts) or hold replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.errors import UserError

EMPTY = -1
VERSION = 1


def count_slots(num_experts: int, ranks: int, redundant_slots: int = 0) -> int:
    """Slots P: an equal share a rank, rounded up, and `redundant_slots` more on each."""
    return ranks * (-(-num_experts // ranks) + redundant_slots)


@dataclass(frozen=True)
class Placement:
    """For each MoE layer the expert in each slot, int32 [L, P] with EMPTY (-1) for none.

    Raises UserError, naming layer and expert, if an expert is missing or a slot names one that is not there.
    """

    physical_to_logical: np.ndarray
    num_experts: int

    def __post_init__(self) -> None:
        table = np.asarray(self.physical_to_logical, np.int32)
        if table.ndim != 2:
            raise UserError(f"The placement table has shape {table.shape}: it must be [layers, slots].")
        object.__setattr__(self, "physical_to_logical", table)
        for layer, slots in enumerate(table):
            wrong = slots[(slots < EMPTY) | (slots >= self.num_experts)]
            if wrong.size:
                raise UserError(f"Placement of layer {layer} names expert {wrong[0]}: experts are 0 to {self.num_experts - 1}.")
            missing = np.setdiff1d(np.arange(self.num_experts), slots)
            if missing.size:
                raise UserError(f"Placement of layer {layer} leaves expert {missing[0]} without a slot: give each expert one.")

    @property
    def num_slots(self) -> int:
        """P."""
        return self.physical_to_logical.shape[1]

    @property
    def empty_slots(self) -> int:
        """Slots of a layer that hold nothing, at most over layers."""
        return int(np.max(np.sum(self.physical_to_logical == EMPTY, axis=1), initial=0))

    @property
    def max_replicas(self) -> int:
        """Replicas that one expert can have in a table of this shape; static, so that tables can change without recompiling."""
        return self.num_slots - self.num_experts + 1

    def logical_to_physical(self) -> np.ndarray:
        """Slots of each expert, int32 [L, E, max_replicas]; places beyond its replica count repeat its first slot."""
        layers = self.physical_to_logical.shape[0]
        slots = np.zeros((layers, self.num_experts, self.max_replicas), np.int32)
        for layer, table in enumerate(self.physical_to_logical):
            for expert in range(self.num_experts):
                held = np.flatnonzero(table == expert)
                slots[layer, expert] = held[0]
                slots[layer, expert, : held.size] = held
        return slots

    def replica_count(self) -> np.ndarray:
        """Replicas of each expert, int32 [L, E], at least 1."""
        held = self.physical_to_logical[:, :, None] == np.arange(self.num_experts)
        return np.asarray(np.sum(held, axis=1), np.int32)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form that `from_json` reads."""
        return {
            "version": VERSION,
            "num_experts": self.num_experts,
            "num_slots": self.num_slots,  # what an empty table (no MoE layers) does not show
            "physical_to_logical": self.physical_to_logical.tolist(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Placement:
        """Reads `to_json`'s form. Raises UserError for another version."""
        if value.get("version") != VERSION:
            raise UserError(f"The placement table has version {value.get('version')!r}: this program reads version {VERSION}.")
        table = np.array(value["physical_to_logical"], np.int32).reshape(-1, value["num_slots"])
        return cls(table, value["num_experts"])


def contiguous(layers: int, num_experts: int, ranks: int, redundant_slots: int = 0) -> Placement:
    """The default: equal runs of experts a rank; the last ranks' spare slots stay empty.

    Redundant slots hold replicas of the rank's own experts in turn (a planner does better).
    """
    share = -(-num_experts // ranks)
    table = np.full((ranks, count_slots(num_experts, ranks, redundant_slots) // ranks), EMPTY, np.int32)
    for rank in range(ranks):
        own = np.arange(rank * share, min((rank + 1) * share, num_experts))
        table[rank, : own.size] = own
        if own.size:
            table[rank, share:] = own[np.arange(redundant_slots) % own.size]
    return Placement(np.tile(table.reshape(1, -1), (layers, 1)), num_experts)


def slot_sources(old: Placement, new: Placement) -> np.ndarray:
    """For each slot of `new` the slot of `old` with the same expert's weights, int32 [L, P]; EMPTY for empty slots."""
    first = old.logical_to_physical()[:, :, 0]
    table = new.physical_to_logical
    return np.where(table == EMPTY, EMPTY, np.take_along_axis(first, np.maximum(table, 0), axis=1)).astype(np.int32)
