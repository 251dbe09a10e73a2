"""The status of a run as lines and tables of at most 80 columns: `moe-jax status RUN_DIR`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_jax.tracking.status.gather import gather_status
from moe_jax.utils.units import duration, ranges

_WIDTH = 80
RANKS_SHOWN = 8
MEANINGS = {
    "data": "waiting for data",
    "restart": "between attempts",
    "recomputed": "steps computed again",
    "end": "ending",
    "stopped": "stopped",
}


def print_status(run_dir: Path, *, as_json: bool = False) -> None:
    """Prints how a run does, as text or JSON. Raises UserError for a folder that is no run."""
    status = gather_status(run_dir, time.time())
    if as_json:
        print(json.dumps(status, indent=2))
        return
    console = Console(highlight=False)
    console.print(draw_status(status, boxed=console.is_terminal), width=min(console.width, _WIDTH))


def draw_status(status: dict[str, Any], *, boxed: bool = False) -> Group:
    """All that `gather_status` found."""
    parts: list[RenderableType] = [Text(line) for line in _top(status)]
    if status["processes"]:
        columns = ("process", "host", "state", "step", "phase", "for", "s/step")
        parts += ["", _table(columns, map(_process_row, status["processes"]), boxed)]
    if status["slow"]:
        parts.append(Text(f"slow: {status['slow']['text']}"))
    if status["experts"]:
        heads = ("layers", "expert load", "device load", "dead experts", "dropped")
        rows = map(_group_row, status["experts"]["groups"])
        parts += ["", Text(_experts(status["experts"])), _table(heads, rows, boxed)]
    assignment = (status["checkpoint"] or {}).get("assignment")
    if assignment:
        parts += ["", *map(Text, _assignment(assignment))]
    if status["goodput"]:
        parts += ["", *_goodput(status["goodput"], boxed)]
    else:
        parts.append(Text("It has no accounts of time: an earlier version trained it."))
    return Group(*parts)


def _top(status: dict[str, Any]) -> list[str]:
    steps = "" if status["steps"] is None else f"/{status['steps']:,}"
    mesh = status["mesh"]
    shape = "" if mesh is None else "  mesh " + " ".join(f"{k}={v}" for k, v in mesh.items())
    saved = status["checkpoint"]
    checkpoint = (
        "no checkpoint"
        if saved is None
        else f"checkpoint of step {saved['step']:,}, {duration(saved['age'])} old"
    )
    return [
        f"{Path(status['run']).resolve().name}  {status['state']}  step {status['step']:,}{steps}"
        f"{shape}",
        f"{checkpoint}  restarts: {status['restarts']}",
    ]


def _process_row(process: dict[str, Any]) -> tuple[str, ...]:
    seconds = process["step_seconds"]
    return (
        str(process["process"]),
        process["host"],
        process["state"],
        f"{process['step']:,}",
        process["phase"],
        duration(process["phase_age"] if process["state"] == "live" else process["silent"]),
        "-" if seconds is None else f"{seconds:.3g}",
    )


def _experts(experts: dict[str, Any]) -> str:
    slots = experts["slots"]
    held = "" if slots is None else f" in {slots} slots, {experts['slots_per_rank']} per rank"
    return f"{experts['experts']} experts{held}; load of step {experts['step']:,}, largest / mean"


def _group_row(group: dict[str, Any]) -> tuple[str, ...]:
    device = group["device_load_max_over_mean"]
    return (
        ranges(group["layers"]),
        f"{group['load_max_over_mean']:.2f}",
        "-" if device is None else f"{device:.2f}",
        str(group["dead_experts"]),
        f"{group['dropped_fraction']:.1%}",
    )


def _assignment(assignment: dict[str, Any]) -> list[str]:
    ranks = assignment["ranks"]
    shown = [
        f"rank {rank}: experts {ranges(set(held) - {-1})}"
        for rank, held in enumerate(ranks[:RANKS_SHOWN])
    ]
    others = [] if len(ranks) <= RANKS_SHOWN else [f"and {len(ranks) - RANKS_SHOWN} more ranks"]
    note = (
        "all layers" if assignment["same_in_all_layers"] else "the first MoE layer (others differ)"
    )
    return [f"Experts by rank in {note}:", *shown, *others]


def _goodput(account: dict[str, Any], boxed: bool) -> list[RenderableType]:
    wall, share = account["wall"], account["share"]
    spent = {"productive steps": account["productive"]} | {
        MEANINGS.get(cause, cause): seconds for cause, seconds in account["lost"].items() if seconds
    }
    rows = ((what, f"{s:,.1f} s", f"{s / wall:.1%}") for what, s in spent.items() if wall > 0)
    good = "-" if share is None else f"{share:.1%}"
    table = _table(("time", "spent", "of all"), rows, boxed)
    return [Text(f"goodput {good} of {duration(wall)}"), table]


def _table(heads: Sequence[str], rows: Any, boxed: bool) -> Table:
    table = Table(box=box.ROUNDED if boxed else None, pad_edge=False)
    for head in heads:
        words = head in ("host", "state", "phase", "time", "layers")
        table.add_column(head, justify="left" if words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
