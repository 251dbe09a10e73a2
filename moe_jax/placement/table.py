"""Placement tables: which slot of which device holds each expert. Plain numpy, checked on
construction.

Weights are stored in slot order, [P, ...] sharded over the `expert` axis, so slot p is on rank
p // (P/R). Routing uses logical order, and a table translates. P can be larger than the number of
experts: the other slots are empty (if the axis does not divide the experts) or hold replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.errors import UserError

EMPTY = -1
TABLE_VERSION = 2


def count_slots(num_experts: int, ranks: int, redundant_slots: int = 0) -> int:
    """Slots P: per rank an equal share of the experts, rounded up, and `redundant_slots` more."""
    return ranks * (-(-num_experts // ranks) + redundant_slots)


@dataclass(frozen=True)
class Placement:
    """For each MoE layer the expert in each slot, int32 [L, P] with EMPTY (-1) for none; rank r
    holds slots r*P/R to (r+1)*P/R - 1.

    Raises UserError, which names layer and expert, if an expert is missing, a slot names an unknown
    expert, or a device would hold an expert twice, which is of no use.
    """

    physical_to_logical: np.ndarray
    num_experts: int
    ranks: int

    def __post_init__(self) -> None:
        table = np.array(self.physical_to_logical, np.int32)
        if table.ndim != 2 or self.ranks < 1 or table.shape[1] % self.ranks:
            raise UserError(
                f"The placement table has shape {table.shape}: it must be [layers, slots], as "
                f"many slots on each of {self.ranks} devices."
            )
        table.flags.writeable = False
        object.__setattr__(self, "physical_to_logical", table)
        for layer, slots in enumerate(table):
            wrong = slots[(slots < EMPTY) | (slots >= self.num_experts)]
            if wrong.size:
                raise UserError(
                    f"Placement of MoE layer {layer} names expert {wrong[0]}: use 0 to "
                    f"{self.num_experts - 1}, or -1 for none."
                )
            missing = np.setdiff1d(np.arange(self.num_experts), slots)
            if missing.size:
                raise UserError(
                    f"Placement of MoE layer {layer} leaves expert {missing[0]} without a slot: "
                    f"give each expert one."
                )
        held = np.sort(self.by_rank, axis=-1)
        twice = np.argwhere((held[..., 1:] == held[..., :-1]) & (held[..., 1:] != EMPTY))
        if twice.size:
            layer, rank, at = twice[0]
            raise UserError(
                f"Placement of MoE layer {layer} has expert {held[layer, rank, at]} twice on "
                f"device {rank}: put its replica on another."
            )

    @property
    def num_slots(self) -> int:
        """P."""
        return self.physical_to_logical.shape[1]

    @property
    def by_rank(self) -> np.ndarray:
        """The table as [L, R, P/R]."""
        layers, slots = self.physical_to_logical.shape
        return self.physical_to_logical.reshape(layers, self.ranks, slots // self.ranks)

    @property
    def empty_slots(self) -> int:
        """Empty slots per layer, the maximum over layers."""
        return int(np.max(np.sum(self.physical_to_logical == EMPTY, axis=1), initial=0))

    def first_slot(self) -> np.ndarray:
        """The first slot of each expert, int32 [L, E]."""
        return np.argmax(
            self.physical_to_logical[:, None, :] == np.arange(self.num_experts)[:, None], axis=-1
        ).astype(np.int32)

    def slots_of(self, layer: int, expert: int) -> np.ndarray:
        """The slots that hold an expert, ascending."""
        return np.flatnonzero(self.physical_to_logical[layer] == expert)

    def logical_to_physical(self) -> np.ndarray:
        """Slots of each expert, ascending, int32 [L, E, largest replica count], filled up with
        EMPTY.
        """
        counts = self.replica_count()
        slots = np.full((*counts.shape, int(counts.max(initial=1))), EMPTY, np.int32)
        order = np.argsort(self.physical_to_logical, axis=1, kind="stable")
        for layer, table in enumerate(self.physical_to_logical):
            ordered = order[layer][np.sum(table == EMPTY) :]
            expert = table[ordered]
            replica = np.arange(ordered.size) - (np.cumsum(counts[layer]) - counts[layer])[expert]
            slots[layer, expert, replica] = ordered
        return slots

    def replica_count(self) -> np.ndarray:
        """Replicas of each expert, int32 [L, E], at least 1."""
        held = self.physical_to_logical[:, :, None] == np.arange(self.num_experts)
        return np.asarray(np.sum(held, axis=1), np.int32)

    def host_counts(self, hosts: int) -> np.ndarray:
        """Replicas of each expert on each of `hosts`, which hold equally many consecutive ranks,
        int32 [L, N, E].
        """
        layers = len(self.physical_to_logical)
        host_P = np.arange(self.num_slots) * hosts // self.num_slots
        # One place more, into which EMPTY falls.
        counts_LNE = np.zeros((layers, hosts, self.num_experts + 1), np.int32)
        np.add.at(counts_LNE, (np.arange(layers)[:, None], host_P, self.physical_to_logical), 1)
        return counts_LNE[..., :-1]

    def routing(self, hosts: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rule by which choices go to slots, for tokens of each of `hosts`.

        A host's tokens use the replicas on their own host in turn or, if it has none, all replicas.
        Returns the slots by expert, those on the host first and empty ones last, int32 [L, N, P];
        where those of each expert begin [L, E]; and how many of them are used [L, N, E].
        """
        table, counts = self.physical_to_logical, self.replica_count()
        host_P = np.arange(self.num_slots) * hosts // self.num_slots
        away_NP = host_P != np.arange(hosts)[:, None]
        expert_LP = np.where(table == EMPTY, self.num_experts, table)
        slots_LNP = np.argsort(2 * expert_LP[:, None] + away_NP, axis=-1, kind="stable")
        near_LNE = self.host_counts(hosts)
        replicas_LNE = np.where(near_LNE > 0, near_LNE, counts[:, None])
        return (
            slots_LNP.astype(np.int32),
            (np.cumsum(counts, axis=1) - counts).astype(np.int32),
            replicas_LNE.astype(np.int32),
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form that `from_json` reads."""
        return {
            "version": TABLE_VERSION,
            "num_experts": self.num_experts,
            "ranks": self.ranks,
            "num_slots": self.num_slots,  # an empty table (no MoE layers) does not show it
            "physical_to_logical": self.physical_to_logical.tolist(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Placement:
        """Reads the form of `to_json`, and that of version 1, which does not name devices. Raises
        UserError for another version.
        """
        if value.get("version") not in (1, TABLE_VERSION):
            raise UserError(
                f"The placement table has version {value.get('version')!r}: this program reads "
                f"version {TABLE_VERSION}."
            )
        table = np.array(value["physical_to_logical"], np.int32).reshape(-1, value["num_slots"])
        return cls(table, value["num_experts"], value.get("ranks", 1))


def contiguous(layers: int, num_experts: int, ranks: int, redundant_slots: int = 0) -> Placement:
    """The default: consecutive experts per rank, owner = expert // share; spare slots of the last
    ranks stay empty.

    The redundant slots of a rank hold replicas of the experts after its own (a planner does
    better).
    """
    share = -(-num_experts // ranks)
    first = np.arange(ranks)[:, None] * share
    own = first + np.arange(share)
    own = np.where(own < num_experts, own, EMPTY)
    after = first + share + np.arange(redundant_slots)
    # No replica of an expert that the rank has already.
    after = np.where(share + np.arange(redundant_slots) < num_experts, after % num_experts, EMPTY)
    return _every_layer(np.concatenate([own, after], axis=1), layers, num_experts)


def round_robin(layers: int, num_experts: int, ranks: int, redundant_slots: int = 0) -> Placement:
    """Experts dealt out one by one, owner = expert % ranks; the redundant slots of a rank hold
    replicas of the first experts of the next rank.
    """
    share, rank = -(-num_experts // ranks), np.arange(ranks)[:, None]
    own = rank + np.arange(share) * ranks
    after = (rank + 1) % ranks + np.arange(redundant_slots) * ranks
    if ranks == 1:
        after = np.full_like(after, num_experts)
    table_RN = np.concatenate([own, after], axis=1)
    return _every_layer(np.where(table_RN < num_experts, table_RN, EMPTY), layers, num_experts)


def _every_layer(table_RN: np.ndarray, layers: int, num_experts: int) -> Placement:
    return Placement(np.tile(table_RN.reshape(1, -1), (layers, 1)), num_experts, len(table_RN))


def slot_sources(old: Placement, new: Placement) -> np.ndarray:
    """For each slot of `new` the slot of `old` with the weights of the same expert, int32 [L, P];
    EMPTY for empty slots.

    A slot that keeps its expert is its own source. Otherwise the source is on the same device, if
    the device has the expert.
    """
    table = new.physical_to_logical
    sources = np.take_along_axis(old.first_slot(), np.maximum(table, 0), axis=1)
    if old.num_slots == new.num_slots and old.ranks == new.ranks:
        before, after = old.by_rank, new.by_rank
        same_LRNM = after[..., :, None] == before[..., None, :]
        here = np.argmax(same_LRNM, axis=-1) + np.arange(old.ranks)[:, None] * before.shape[-1]
        sources = np.where(np.any(same_LRNM, axis=-1), here, sources.reshape(after.shape)).reshape(
            table.shape
        )
        sources = np.where(table == old.physical_to_logical, np.arange(table.shape[1]), sources)
    return np.where(table == EMPTY, EMPTY, sources).astype(np.int32)
