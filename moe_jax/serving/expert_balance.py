"""Where the experts of a server should be, by the load of late: numbers in, tables out.

    balance = ExpertBalance(placement, every=2000, budget=64)
    balance.observe(slot_counts_LP)          # every `balance.half` steps
    table = balance.next_table()             # at each step: where experts are to move now, or None
    balance.moved(table, seconds)

The planner is training's (placement/plan.py), and so is the rule by which a plan is believed
(placement/trial.py). It works in a thread of its own while steps go on. Its table is reached in
several, one for each call of the program that moves experts, so that streams wait for one call at a
time.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from moe_jax.placement.cost import max_over_mean, planned_traffic
from moe_jax.placement.plan import plan_placement
from moe_jax.placement.schedule import NOTHING, moves_between, plan_migration
from moe_jax.placement.table import EMPTY, Placement
from moe_jax.placement.topology import one_host
from moe_jax.placement.trial import mix_layers, try_plan
from moe_jax.serving.request import ExpertStats

MIN_GAIN = 0.05  # of the busiest device's load, below which a layer's experts stay
LEAST_CHOICES = 16  # per expert on average, in each half of a window


class ExpertBalance:
    """The experts' load, and what follows from it. It belongs to the engine's thread."""

    def __init__(self, placement: Placement, every: int | None, budget: int):
        """`every` so many steps a plan is made; None: never. `budget` is that of a call."""
        self.placement, self.every = placement, every
        self.half = None if every is None else max(1, every // 2)
        self._budget = budget
        self._before_LE = np.zeros((len(placement.physical_to_logical), placement.num_experts))
        self._slots_LP = np.zeros(placement.physical_to_logical.shape)
        self._since_LE = self._middle_LE = self._before_LE
        self._thread = None if every is None else ThreadPoolExecutor(1, "expert-balance")
        self._planned: Future[list[Placement]] | None = None
        self._next: deque[Placement] = deque()
        self._stats = ExpertStats(placement.physical_to_logical, placement.ranks)

    def read(self, slot_counts_LP: np.ndarray) -> None:
        """Choices by slot since the start or the last move."""
        self._slots_LP = slot_counts_LP

    @property
    def choices_LE(self) -> np.ndarray:
        """Choices of each expert since the start, i64 [MoE layers, E]."""
        return (self._before_LE + by_expert(self.placement, self._slots_LP)).astype(np.int64)

    @property
    def stats(self) -> ExpertStats:
        """What is told of it."""
        rows_LR = by_device(self.placement, self._slots_LP).astype(np.int64)
        return self._stats._replace(device_choices=rows_LR)

    def observe(self, slot_counts_LP: np.ndarray) -> None:
        """As `read`, after half of a window: two of them, with choices enough, make a plan."""
        self.read(slot_counts_LP)
        if self._thread is None or self._planned is not None or self._next:
            return
        total_LE = self.choices_LE
        if _too_few(self._middle_LE - self._since_LE):
            self._middle_LE = total_LE
        elif not _too_few(total_LE - self._middle_LE):
            first_LE, second_LE = self._middle_LE - self._since_LE, total_LE - self._middle_LE
            self._planned = self._thread.submit(
                plan_tables, first_LE, second_LE, self.placement, self._budget
            )

    def next_table(self) -> Placement | None:
        """Where experts are to be before the next step, if elsewhere than now."""
        if self._planned is not None and self._planned.done():
            self._next.extend(self._planned.result())
            self._planned = None
            self._since_LE = self._middle_LE = self.choices_LE
            if self._next:
                self._stats = self._stats._replace(before=self._unevenness())
        return self._next.popleft() if self._next else None

    def moved(self, table: Placement, seconds: float) -> None:
        """Experts are there now; streams waited so long."""
        self._before_LE = self.choices_LE
        moves = len(moves_between(self.placement, table))
        self.placement, self._slots_LP = table, np.zeros_like(self._slots_LP)
        self._since_LE = self._middle_LE = self._before_LE
        stats = self._stats
        self._stats = stats._replace(
            slots=table.physical_to_logical,
            moves=stats.moves + moves,
            pauses=stats.pauses + 1,
            pause_seconds=stats.pause_seconds + seconds,
            longest_pause=max(stats.longest_pause, seconds),
        )

    def close(self) -> None:
        """Ends the planner's thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _unevenness(self) -> float:
        return float(max_over_mean(by_device(self.placement, self._slots_LP)).mean())


def plan_tables(
    first_LE: np.ndarray, second_LE: np.ndarray, present: Placement, budget: int
) -> list[Placement]:
    """The tables on the way from the present one to a better one, each a call of `budget` from the
    one before; none where no layer would gain.

    The traffic is that of the two halves of a window: a plan by the first is tried on the second.
    """

    def plan(load_LRE: np.ndarray, present: Placement) -> Placement:
        # What is asked for are the slots that there are: replicas are in those that are spare.
        spare = present.num_slots // present.ranks - -(-present.num_experts // present.ranks)
        return plan_placement(
            "balanced",
            load_LRE,
            ranks=present.ranks,
            redundant_slots=spare,
            topology=None,
            present=present,
        )

    def worth(table: Placement, load_LRE: np.ndarray) -> np.ndarray:
        return planned_traffic(table, load_LRE, one_host(table.ranks)).load_LR.max(-1)

    def by_rank(load_LE: np.ndarray) -> np.ndarray:
        """All ranks see all tokens: an equal part of the choices each."""
        return np.repeat(load_LE[:, None] / present.ranks, present.ranks, axis=1)

    halves = (by_rank(first_LE), by_rank(second_LE))
    _, better_L = try_plan(plan, worth, halves, present, MIN_GAIN)
    if not better_L.any():
        return []
    new = mix_layers(better_L, plan(by_rank(first_LE + second_LE), present), present)
    tables, table = [], present
    for call in plan_migration(present, new, budget).calls:
        layers = np.setdiff1d(call.send_layer_RG, NOTHING)
        table = mix_layers(np.isin(np.arange(len(better_L)), layers), new, table)
        tables.append(table)
    return tables


def by_expert(placement: Placement, slot_LP: np.ndarray) -> np.ndarray:
    """Sums over slots [L, P] by the expert in them, float64 [L, E]."""
    table_LP = placement.physical_to_logical
    # One place more, into which EMPTY falls.
    sum_LE = np.zeros((len(table_LP), placement.num_experts + 1))
    np.add.at(sum_LE, (np.arange(len(table_LP))[:, None], table_LP), slot_LP)
    return sum_LE[:, :EMPTY]


def by_device(placement: Placement, slot_LP: np.ndarray) -> np.ndarray:
    """Sums over slots [L, P] by the device that has them, [L, R]."""
    layers, slots = slot_LP.shape
    return slot_LP.reshape(layers, placement.ranks, slots // placement.ranks).sum(-1)


def _too_few(load_LE: np.ndarray) -> bool:
    return bool(load_LE.sum() < LEAST_CHOICES * load_LE.size)
