"""Which experts of a layer the device holds when it cannot hold all: the bookkeeping of
`offload.py`, numpy alone.

The rule is least recently used, which fits: neighbouring tokens choose many of the same experts
(Eliseev and Mazur, 2023, "Fast Inference of Mixture-of-Experts Language Models with Offloading").
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_jax.placement.table import EMPTY


class ExpertCache:
    """The slots of one layer, and who is in them."""

    def __init__(self, num_experts: int, size: int):
        self.expert_P = np.full(size, EMPTY, np.int32)
        self._slot_E = np.full(num_experts, EMPTY, np.int32)
        self._used_P = np.zeros(size, np.int64)  # when each slot was last asked for; 0 for never
        self._now = 0

    def rounds(self, wanted: np.ndarray) -> list[np.ndarray]:
        """Distinct experts in groups that fit the slots together, those that are there first; at
        least one group.
        """
        there = self._slot_E[wanted] != EMPTY
        ordered, size = np.concatenate([wanted[there], wanted[~there]]), len(self.expert_P)
        return [ordered[at : at + size] for at in range(0, max(1, len(ordered)), size)]

    def admit(self, wanted: np.ndarray) -> list[tuple[int, int]]:
        """Gives each of these experts, no more than there are slots, a slot; (expert, slot) of
        those that must be fetched.

        Slots asked for longest ago are given away first, and none that one of `wanted` is in.
        """
        self._now += 1
        kept_P = np.isin(self.expert_P, wanted)
        self._used_P[kept_P] = self._now
        missing = wanted[self._slot_E[wanted] == EMPTY]
        oldest = np.argsort(self._used_P, kind="stable")
        slots = oldest[~kept_P[oldest]][: len(missing)]
        leaving = self.expert_P[slots]
        self._slot_E[leaving[leaving != EMPTY]] = EMPTY
        self.expert_P[slots], self._slot_E[missing], self._used_P[slots] = missing, slots, self._now
        return list(zip(missing.tolist(), slots.tolist(), strict=True))

    def table(self, wanted: np.ndarray) -> np.ndarray:
        """Slots of these experts, int32 [E + 1]; P, no slot, for all others and for padding, which
        is expert E.
        """
        table = np.full(len(self._slot_E) + 1, len(self.expert_P), np.int32)
        table[wanted] = self._slot_E[wanted]
        return table


class ExpertCounts(NamedTuple):
    """How often experts were asked for, once per layer and step however many tokens chose them, and
    were on the device or not.
    """

    tokens: int
    hits_L: np.ndarray
    misses_L: np.ndarray
    bytes_L: np.ndarray  # fetched

    @property
    def hit_rate(self) -> float:
        """Hits among all; 0 before the first."""
        hits, misses = int(self.hits_L.sum()), int(self.misses_L.sum())
        return hits / max(1, hits + misses)

    @property
    def bytes_per_token(self) -> float:
        """Bytes fetched per token, over all layers."""
        return int(self.bytes_L.sum()) / max(1, self.tokens)
