"""Today's placement beside a proposed one: what each would do with the measured traffic, as tables,
JSON and a picture.

    found = compare(today, proposed, measured, topology)
    print_comparison(found); comparison_figure(found).savefig("plan.png")

Rows are (token, choice) pairs a step, over the whole mesh. All is arithmetic on measured traffic:
what is predicted holds as far as the traffic stays as it was.
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

MOST_DEVICES = 32  # lines of the table of devices
MOST_LAYERS = 16  # lines of the table of layers
MOST_COLUMNS = 8  # of the traffic matrix; more devices are shown in the picture


class Outcome(NamedTuple):
    """What a table does with the traffic, float64."""

    load_LR: np.ndarray
    sent_RR: np.ndarray  # all layers together
    link_L: np.ndarray  # rows over the busiest link
    cost_L: np.ndarray


class Comparison(NamedTuple):
    """Both tables under the same traffic."""

    title: str
    layers: list[int]
    host_R: np.ndarray
    today: Outcome
    proposed: Outcome
    moves_L: np.ndarray  # experts that must be sent to a device that does not hold them
    slots: tuple[int, int]  # a device
    notes: list[str]


def compare(
    title: str,
    today: Placement,
    proposed: Placement,
    measured: MeasuredTraffic,
    topology: Topology | None,
    tensor: int,
    notes: list[str],
) -> Comparison:
    """What both tables, for equally many devices, do with the traffic. Without a topology all
    devices are on one host.
    """
    ranks, traffic_LRE = proposed.ranks, measured.traffic_LRE
    if traffic_LRE.shape[1] != ranks:  # of other sources, or unknown ones: all alike
        traffic_LRE = np.repeat(traffic_LRE.sum(1, keepdims=True) / ranks, ranks, axis=1)
        notes = [
            *notes,
            f"The traffic is not that of {ranks} devices: each is taken to send an equal part "
            f"of it.",
        ]
    host_R = one_host(ranks) if topology is None else topology.host_of_rank(ranks, tensor)
    weight = 1.0 if topology is None else topology.between_weight
    outcomes = []
    for table in (today, proposed):
        found = planned_traffic(table, traffic_LRE, host_R)
        link_L = link_rows(found.sent_LRR, host_R, weight)
        outcomes.append(
            Outcome(found.load_LR, found.sent_LRR.sum(0), link_L, cost(found, host_R, weight))
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
    )


def figures(found: Comparison) -> dict[str, tuple[float, float]]:
    """The figures that sum it up, today and proposed; of layers the sum, or the mean where it is a
    ratio.
    """
    both = (found.today, found.proposed)

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
    """By which part the second is lower than the first; 0 where there was nothing."""
    return 1 - pair[1] / pair[0] if pair[0] else 0.0


def comparison_json(found: Comparison) -> dict[str, Any]:
    """All figures, by layer and device too."""
    sums = {name: {"today": pair[0], "proposed": pair[1]} for name, pair in figures(found).items()}
    gains = {name: gain(pair) for name, pair in figures(found).items() if name.endswith("_rows")}
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
                    found.layers,
                    max_over_mean(one.load_LR).tolist(),
                    one.link_L.tolist(),
                    one.cost_L.tolist(),
                    strict=True,
                )
            ],
        }
        for name, one in (("today", found.today), ("proposed", found.proposed))
    }
    slots = dict(zip(("today", "proposed"), found.slots, strict=True))
    head = {
        "title": found.title,
        "moves": int(found.moves_L.sum()),
        "slots_per_device": slots,
        "predicted_gain": gains,
    }
    return head | {
        "host_of_device": found.host_R.tolist(),
        "figures": sums,
        **parts,
        "notes": found.notes,
    }


# What is shown.

COMPARISON_LABELS = {
    "max_over_mean": "device load, max / mean, mean of layers",
    "worst_layer_max_over_mean": "device load, max / mean, worst layer",
    "busiest_device_rows": "rows of the busiest device, sum of layers",
    "busiest_link_rows": "rows on the busiest link, sum of layers",
    "cost_rows": "cost: device + link, sum of layers",
}


def print_comparison(found: Comparison) -> None:
    """Prints tables of at most 80 columns, without frames or colours in a pipe."""
    show = _Printer()
    show.line(found.title)
    slots = (
        f"{found.slots[0]:,}"
        if found.slots[0] == found.slots[1]
        else f"{found.slots[0]:,} today, {found.slots[1]:,} proposed"
    )
    show.line(
        f"rows are (token, choice) pairs a step; {slots} slots a device in each of "
        f"{len(found.layers):,} MoE layers"
    )
    rows = [
        (COMPARISON_LABELS[name], *(f"{value:,.2f}" for value in pair), f"{-gain(pair):+.1%}")
        for name, pair in figures(found).items()
    ]
    show.table(("", "today", "proposed", "change"), rows)
    show.table(
        ("device", "host", "today", "x mean", "proposed", "x mean"),
        _device_rows(found),
        _left_out(len(found.host_R), MOST_DEVICES),
    )
    order_L = np.sort(
        np.argsort(-(found.today.cost_L - found.proposed.cost_L), kind="stable")[:MOST_LAYERS]
    )
    both = [(max_over_mean(one.load_LR), one.link_L) for one in (found.today, found.proposed)]
    layers = [
        (
            str(found.layers[i]),
            *(f"{ratio[i]:.2f}" for ratio, _ in both),
            *(f"{link[i]:,.0f}" for _, link in both),
            f"{found.moves_L[i]}",
        )
        for i in order_L
    ]
    left = (
        f"the {MOST_LAYERS} of {len(found.layers)} layers that gain most"
        if len(found.layers) > MOST_LAYERS
        else ""
    )
    show.table(("layer", "max/mean", "proposed", "link rows", "proposed", "moves"), layers, left)
    for name, one in (("today", found.today), ("proposed", found.proposed)):
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
    sums, moved = figures(found), int(found.moves_L.sum())
    changes = [f"{-gain(sums[name]):+.1%}" for name in ("busiest_device_rows", "busiest_link_rows")]
    show.line("")
    show.line(
        f"{moved:,} experts must move. Predicted, if the traffic stays as measured: rows of the "
        f"busiest device {changes[0]}, "
        f"on the busiest link {changes[1]}."
    )
    for note in found.notes:
        show.line(note)


def _device_rows(found: Comparison) -> list[tuple[str, ...]]:
    """A line a device, the busiest today where there are many."""
    loads = [one.load_LR.sum(0) for one in (found.today, found.proposed)]
    means = [max(float(load.mean()), 1e-30) for load in loads]
    shown = np.sort(np.argsort(-loads[0], kind="stable")[:MOST_DEVICES])
    parts = [
        [(f"{load[r]:,.0f}", f"{load[r] / mean:.2f}") for r in shown]
        for load, mean in zip(loads, means, strict=True)
    ]
    return [
        (str(r), str(found.host_R[r]), *old, *new)
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
        """A table below its caption; columns hold numbers, or `words`, which begin at the left."""
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
    """Which experts each device holds in each layer, or in the layer `only` alone; layers that are
    alike are told once.
    """
    from moe_jax.utils.units import ranges

    alike: dict[bytes, list[int]] = {}
    for index, number in enumerate(layers):
        if only in (None, number):
            alike.setdefault(table.physical_to_logical[index].tobytes(), []).append(index)
    show = _Printer()
    show.line(
        f"{table.num_experts:,} experts in {table.num_slots // table.ranks:,} slots on each of "
        f"{table.ranks:,} devices"
    )
    for same in alike.values():
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
    """What moves where between two tables for the same model and as many devices, by layer, and how
    many in all.
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
