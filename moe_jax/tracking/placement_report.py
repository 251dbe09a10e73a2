"""Today's placement and a proposed one: what each does with the measured traffic, as tables, JSON
and a picture.

    comparison = compare("plan", today, proposed, measured, topology, tensor=1, notes=[])
    print_comparison(comparison)
    comparison_figure(comparison).savefig("plan.png")

Rows are (token, choice) pairs per step, over the whole mesh. Everything is computed from measured
traffic: the prediction is right if the traffic stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.placement.cost import cost, link_rows, max_over_mean, planned_traffic
from moe_jax.placement.relabel import moves
from moe_jax.placement.table import EMPTY, Placement
from moe_jax.placement.topology import Topology, one_host
from moe_jax.tracking.traffic import MeasuredTraffic

MOST_DEVICES = 32  # lines in the table of devices
MOST_LAYERS = 16  # lines in the table of layers
MOST_COLUMNS = 8  # of the traffic matrix; for more devices there is the picture


class Outcome(NamedTuple):
    """What a table does with the traffic, float64."""

    load_LR: np.ndarray
    sent_RR: np.ndarray  # all layers together
    link_L: np.ndarray  # rows over the busiest link, those between hosts weighted
    cost_L: np.ndarray


class Comparison(NamedTuple):
    """Both tables under the same traffic."""

    title: str
    layers: list[int]
    host_R: np.ndarray
    today: Outcome
    proposed: Outcome
    moves_L: np.ndarray  # experts that must be sent to a device that does not hold them
    slots: tuple[int, int]  # per device, today and proposed
    notes: list[str]
    between_weight: float = 1.0  # what a row counts on the link of a host


def compare(
    title: str,
    today: Placement,
    proposed: Placement,
    measured: MeasuredTraffic,
    topology: Topology | None,
    tensor: int,
    notes: list[str],
) -> Comparison:
    """What both tables, for the same number of devices, do with the traffic. Without a topology
    all devices are on one host.
    """
    ranks, traffic_LRE = proposed.ranks, measured.traffic_LRE
    if traffic_LRE.shape[1] != ranks:  # other or unknown sources: taken as equal
        traffic_LRE = np.repeat(traffic_LRE.sum(1, keepdims=True) / ranks, ranks, axis=1)
        notes = [
            *notes,
            f"The traffic is not that of {ranks} devices: each is assumed to send an equal "
            f"part of it.",
        ]
    host_R = one_host(ranks) if topology is None else topology.host_of_rank(ranks, tensor)
    weight = 1.0 if topology is None else topology.between_weight
    outcomes = []
    for table in (today, proposed):
        traffic = planned_traffic(table, traffic_LRE, host_R)
        link_L = link_rows(traffic.sent_LRR, host_R, weight)
        outcomes.append(
            Outcome(traffic.load_LR, traffic.sent_LRR.sum(0), link_L, cost(traffic, host_R, weight))
        )
    slots = today.num_slots // ranks, proposed.num_slots // ranks
    return Comparison(
        title,
        measured.layers,
        host_R,
        outcomes[0],
        outcomes[1],
        moves(proposed, today).sum(-1),
        slots,
        notes,
        weight if host_R.max(initial=0) > 0 else 1.0,
    )


def figures(comparison: Comparison) -> dict[str, tuple[float, float]]:
    """The figures of the summary, today and proposed: sums over layers, or means of ratios."""
    both = (comparison.today, comparison.proposed)

    def each(take: Any) -> tuple[float, float]:
        return float(take(both[0])), float(take(both[1]))

    return {
        "max_over_mean": each(
            lambda one: np.mean(max_over_mean(one.load_LR)) if len(one.load_LR) else 1.0
        ),
        "worst_layer_max_over_mean": each(
            lambda one: np.max(max_over_mean(one.load_LR), initial=1.0)
        ),
        "busiest_device_rows": each(lambda one: one.load_LR.max(-1, initial=0).sum()),
        "busiest_link_rows": each(lambda one: one.link_L.sum()),
        "cost_rows": each(lambda one: one.cost_L.sum()),
    }


def gain(pair: tuple[float, float]) -> float:
    """By which fraction the second is lower than the first; 0 if the first is 0."""
    return 1 - pair[1] / pair[0] if pair[0] else 0.0


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """All figures, also by layer and device."""
    sums = {
        name: {"today": pair[0], "proposed": pair[1]} for name, pair in figures(comparison).items()
    }
    gains = {
        name: gain(pair) for name, pair in figures(comparison).items() if name.endswith("_rows")
    }
    parts = {
        name: {
            "device_load": one.load_LR.sum(0).tolist(),
            "traffic": one.sent_RR.tolist(),
            "layers": [
                {
                    "layer": layer,
                    "max_over_mean": ratio,
                    "busiest_link_rows": link,
                    "cost_rows": total,
                }
                for layer, ratio, link, total in zip(
                    comparison.layers,
                    max_over_mean(one.load_LR).tolist(),
                    one.link_L.tolist(),
                    one.cost_L.tolist(),
                    strict=True,
                )
            ],
        }
        for name, one in (("today", comparison.today), ("proposed", comparison.proposed))
    }
    slots = dict(zip(("today", "proposed"), comparison.slots, strict=True))
    head = {
        "title": comparison.title,
        "moves": int(comparison.moves_L.sum()),
        "slots_per_device": slots,
        "between_weight": comparison.between_weight,
        "predicted_gain": gains,
    }
    return head | {
        "host_of_device": comparison.host_R.tolist(),
        "figures": sums,
        **parts,
        "notes": comparison.notes,
    }


# What is printed.

COMPARISON_LABELS = {
    "max_over_mean": "device load, max / mean, mean of layers",
    "worst_layer_max_over_mean": "device load, max / mean, worst layer",
    "busiest_device_rows": "rows of the busiest device, sum of layers",
    "busiest_link_rows": "rows on the busiest link, sum of layers",
    "cost_rows": "cost: device + link, sum of layers",
}


def print_comparison(comparison: Comparison) -> None:
    """Prints tables of at most 80 columns, without frames or colours in a pipe."""
    show = _Printer()
    show.line(comparison.title)
    slots = (
        f"{comparison.slots[0]:,}"
        if comparison.slots[0] == comparison.slots[1]
        else f"{comparison.slots[0]:,} today, {comparison.slots[1]:,} proposed"
    )
    show.line(
        f"rows are (token, choice) pairs per step; {slots} slots per device in each of "
        f"{len(comparison.layers):,} MoE layers"
    )
    rows = [
        (
            COMPARISON_LABELS[name],
            *(f"{value:,.{0 if name.endswith('_rows') else 2}f}" for value in pair),
            _change(pair),
        )
        for name, pair in figures(comparison).items()
    ]
    show.table(("", "today", "proposed", "change"), rows)
    if comparison.between_weight != 1:
        show.line(
            f"On links, a row between hosts counts {comparison.between_weight:.3g} times: it takes "
            f"so much longer there than within a host."
        )
    show.table(
        ("device", "host", "today", "x mean", "proposed", "x mean"),
        _device_rows(comparison),
        _left_out(len(comparison.host_R), MOST_DEVICES),
    )
    left = (
        f"the {MOST_LAYERS} of {len(comparison.layers)} layers that gain most"
        if len(comparison.layers) > MOST_LAYERS
        else ""
    )
    show.table(
        ("layer", "max/mean", "proposed", "link rows", "proposed", "moves"),
        _layer_rows(comparison),
        left,
    )
    for name, one in (("today", comparison.today), ("proposed", comparison.proposed)):
        if len(one.sent_RR) <= MOST_COLUMNS:
            matrix = [
                (str(source), *(f"{value:,.0f}" for value in row))
                for source, row in enumerate(one.sent_RR)
            ]
            show.table(
                ("from \\ to", *map(str, range(len(matrix)))),
                matrix,
                f"rows between devices, {name}, all layers",
            )
    sums, moved = figures(comparison), int(comparison.moves_L.sum())
    changes = [_change(sums[name]) for name in ("busiest_device_rows", "busiest_link_rows")]
    show.line("")
    show.line(
        f"{moved:,} experts must move. Predicted, if the traffic stays as measured: rows of the "
        f"busiest device {changes[0]}, "
        f"on the busiest link {changes[1]}."
    )
    for note in comparison.notes:
        show.line(note)


def _change(pair: tuple[float, float]) -> str:
    """What is more or less than today, without a sign where that rounds to nothing."""
    text = f"{-gain(pair):+.1%}"
    return text[1:] if text[1:] == "0.0%" else text


def _layer_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """One line per layer; if there are many, those that gain most."""
    gain_L = comparison.today.cost_L - comparison.proposed.cost_L
    order_L = np.sort(np.argsort(-gain_L, kind="stable")[:MOST_LAYERS])
    both = [
        (max_over_mean(one.load_LR), one.link_L) for one in (comparison.today, comparison.proposed)
    ]
    return [
        (
            str(comparison.layers[i]),
            *(f"{ratio[i]:.2f}" for ratio, _ in both),
            *(f"{link[i]:,.0f}" for _, link in both),
            f"{comparison.moves_L[i]}",
        )
        for i in order_L
    ]


def _device_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """One line per device; if there are many, those that are busiest today."""
    loads = [one.load_LR.sum(0) for one in (comparison.today, comparison.proposed)]
    means = [max(float(load.mean()), 1e-30) for load in loads]
    shown = np.sort(np.argsort(-loads[0], kind="stable")[:MOST_DEVICES])
    parts = [
        [(f"{load[r]:,.0f}", f"{load[r] / mean:.2f}") for r in shown]
        for load, mean in zip(loads, means, strict=True)
    ]
    return [
        (str(r), str(comparison.host_R[r]), *old, *new)
        for r, old, new in zip(shown, *parts, strict=True)
    ]


def _left_out(count: int, most: int) -> str:
    return f"the {most} of {count} devices that are busiest today" if count > most else ""


class _Printer:
    """Lines and tables on stdout."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def table(
        self,
        heads: tuple[str, ...],
        rows: Sequence[tuple[str, ...]],
        caption: str = "",
        *,
        words: bool = False,
    ) -> None:
        """A table below its caption; columns hold numbers, or `words`, which are aligned left."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=box.ROUNDED if self._console.is_terminal else None, pad_edge=False)
        for index, head in enumerate(heads):
            table.add_column(
                escape(head), justify="left" if words or index == 0 else "right", overflow="fold"
            )
        for row in rows:
            table.add_row(*map(escape, row))
        self.line("")
        if caption:
            self.line(caption)
        self._console.print(table)


def print_table(table: Placement, layers: list[int], only: int | None) -> None:
    """Which experts each device holds in each layer, or only in the layer `only`; equal layers are
    printed once.
    """
    from moe_jax.utils.units import ranges

    equal: dict[bytes, list[int]] = {}
    for index, number in enumerate(layers):
        if only in (None, number):
            equal.setdefault(table.physical_to_logical[index].tobytes(), []).append(index)
    show = _Printer()
    show.line(
        f"{table.num_experts:,} experts in {table.num_slots // table.ranks:,} slots on each of "
        f"{table.ranks:,} devices"
    )
    for same in equal.values():
        held_RS, copies_E = table.by_rank[same[0]], table.replica_count()[same[0]]
        rows = [(str(rank), ranges(slots[slots != EMPTY])) for rank, slots in enumerate(held_RS)]
        doubled = np.flatnonzero(copies_E > 1)
        replicas = (
            f"; replicas of {', '.join(f'{e} ({copies_E[e]}x)' for e in doubled)}"
            if doubled.size
            else ""
        )
        empty = f"; {np.sum(held_RS == EMPTY)} slots empty" if np.any(held_RS == EMPTY) else ""
        named = ranges(np.array(layers)[same])
        show.table(
            ("device", "experts"),
            rows,
            f"layer{'s' if len(same) > 1 else ''} {named}{replicas}{empty}",
            words=True,
        )


def print_difference(old: Placement, new: Placement, layers: list[int]) -> None:
    """What moves where between two tables for the same model and number of devices, by layer, and
    how many experts move in total.
    """
    show, total, rows = _Printer(), 0, []
    for index, number in enumerate(layers):
        for rank, (had, has) in enumerate(zip(old.by_rank[index], new.by_rank[index], strict=True)):
            comes, goes = (
                np.setdiff1d(one, [*other, EMPTY]).tolist()
                for one, other in ((has, had), (had, has))
            )
            if comes or goes:
                sources = [old.slots_of(index, e)[0] // (old.num_slots // old.ranks) for e in comes]
                gets = ", ".join(
                    f"{e} from {source}" for e, source in zip(comes, sources, strict=True)
                )
                rows.append(
                    (
                        str(number),
                        str(rank),
                        gets or "nothing",
                        ", ".join(map(str, goes)) or "nothing",
                    )
                )
            total += len(comes)
    if rows:
        show.table(("layer", "device", "gets expert, from device", "gives up"), rows, words=True)
    changed = len({row[0] for row in rows})
    show.line(
        f"{total:,} experts move, in {changed:,} of {len(layers):,} layers."
        if rows
        else "Every device holds the same experts."
    )
