"""The commands about where experts live: placement plan, show and diff; `main.py` adds them to
`moe-jax`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from moe_jax.cli.console import explained_disk_errors
from moe_jax.cli.model_options import one_of
from moe_jax.cli.options import AsJson, Step, option, path_argument, path_option
from moe_jax.errors import UserError
from moe_jax.model_io.source import check_step, require_run
from moe_jax.utils.progress import say

if TYPE_CHECKING:
    from moe_jax.placement.table import Placement
    from moe_jax.tracking.placement_report import Comparison
    from moe_jax.tracking.traffic import MeasuredTraffic

# Those of placement/plan.py, whose import help does not wait for.
PLANNERS = ("contiguous", "round_robin", "balanced", "topology_aware")

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Plan, show and compare where experts live."
)


class _Known(NamedTuple):
    """A table, and what its run says of the mesh and the experts."""

    table: Placement
    layers: list[int]
    devices: int | None = None
    tensor: int = 1
    redundant_slots: int = 0
    groups: int = 1


def plan(
    load: Annotated[
        Path,
        path_argument("RUN_OR_LOAD_FILE", help="Run, or JSON in the form of a run's traffic.json."),
    ],
    strategy: Annotated[
        str, typer.Option(metavar="NAME", help="contiguous, round_robin, balanced, topology_aware.")
    ] = "balanced",
    topology: Annotated[
        Path | None, path_option("--topology", metavar="FILE", help="YAML of hosts and links.")
    ] = None,
    ranks: Annotated[
        int | None,
        option("--ranks", metavar="R", min=1, help="Devices.  [default: those measured]"),
    ] = None,
    redundant_slots: Annotated[
        int | None,
        option(
            "--redundant-slots",
            metavar="N",
            min=0,
            help="For replicas, per device.  [default: the run's, or 0]",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        path_option("--out", metavar="FILE", help="Write the table here, for placement.file."),
    ] = None,
    png: Annotated[
        Path | None,
        path_option(
            "--png",
            metavar="FILE",
            help="Picture.  [default: NAME-placement.png, drawn again each time]",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Propose a table for measured load, and compare it with today's.

    Prints and draws both; nothing changes in the run.
    """
    one_of("--strategy", strategy, PLANNERS)
    name = load.resolve().name if load.is_dir() else load.stem
    picture = png or (load.resolve().parent if load.is_dir() else Path()) / f"{name}-placement.png"
    for option_name, path in (("--png", png), ("--out", out)):
        if path is not None and path.exists() and not overwrite:
            raise UserError(
                f"{option_name} {path} exists already: name another file, or give --overwrite."
            )
    from moe_jax.tracking.figures.placement_plan import comparison_figure
    from moe_jax.tracking.placement_report import comparison_json, print_comparison

    proposed, comparison = _propose(
        load,
        name,
        strategy=strategy,
        topology=topology,
        ranks=ranks,
        redundant_slots=redundant_slots,
    )
    if as_json:
        print(json.dumps(comparison_json(comparison), indent=2))
    else:
        print_comparison(comparison)
    with explained_disk_errors(picture):
        comparison_figure(comparison).savefig(picture, format="png")
        if out is not None:
            out.write_text(json.dumps(proposed.to_json()) + "\n", encoding="utf-8")
    say("wrote " + " and ".join(str(path) for path in (picture, out) if path))


def _propose(
    load: Path,
    name: str,
    *,
    strategy: str,
    topology: Path | None,
    ranks: int | None,
    redundant_slots: int | None,
) -> tuple[Placement, Comparison]:
    """The strategy's table for the measured load, and how it compares with today's: a run's own,
    else the contiguous one.
    """
    from moe_jax.placement.files import read_topology
    from moe_jax.placement.plan import plan_placement
    from moe_jax.placement.table import contiguous
    from moe_jax.tracking.placement_report import compare
    from moe_jax.tracking.traffic import read_measured

    with explained_disk_errors(load):
        measured = read_measured(load)
        layers, _, experts = measured.traffic_LRE.shape
        known = _read_run(load, None) if load.is_dir() else None
    if known is None:
        known = _Known(
            contiguous(layers, experts, ranks or _sources(measured, load)), measured.layers
        )
    devices, today, notes = ranks or known.table.ranks, known.table, []
    if not load.is_dir() or devices != today.ranks:
        today = contiguous(layers, experts, devices)
        notes.append(
            "Today's table is not known for these devices: it is taken to be the contiguous one."
        )
    links = (
        None
        if topology is None
        else read_topology(topology, known.devices if today is known.table else None)
    )
    spare = known.redundant_slots if redundant_slots is None else redundant_slots
    proposed = plan_placement(
        strategy,
        measured.traffic_LRE,
        ranks=devices,
        redundant_slots=spare,
        topology=links,
        present=today,
        groups=known.groups,
        tensor=known.tensor,
    )
    where = f"{devices} devices" + (f" on {links.hosts} hosts" if links else "")
    title = f"{strategy} for {where}, from {measured.steps:,} steps of {name}"
    return proposed, compare(title, today, proposed, measured, links, known.tensor, notes)


def show(
    place: Annotated[Path, path_argument("RUN_OR_TABLE", help="Run, or a table that plan wrote.")],
    step: Step = None,
    layer: Annotated[
        int | None,
        option(
            "--layer",
            metavar="L",
            min=0,
            help="This layer of the model, or of the table's from 0, alone.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which device holds which experts."""
    known = _read(place, step)
    from moe_jax.tracking.placement_report import print_table

    if layer is not None and layer not in known.layers:
        raise UserError(
            f"--layer {layer} has no experts: {place} has experts in layers "
            f"{', '.join(map(str, known.layers)) or 'none'}."
        )
    if as_json:
        print(json.dumps(known.table.to_json()))
    else:
        print_table(known.table, known.layers, layer)


def diff(
    a: Annotated[Path, path_argument("A", help="Run or table before.")],
    b: Annotated[Path, path_argument("B", help="Run or table after.")],
) -> None:
    """Show which experts move where from A to B."""
    before, after = _read(a, None), _read(b, None)
    from moe_jax.tracking.placement_report import print_difference

    sizes = [
        (one.table.ranks, one.table.num_experts, len(one.table.physical_to_logical))
        for one in (before, after)
    ]
    for name, *pair in zip(("devices", "experts", "MoE layers"), *sizes, strict=True):
        if pair[0] != pair[1]:
            raise UserError(
                f"{a} has {pair[0]} {name} and {b} has {pair[1]}: only tables of one size can be "
                f"compared."
            )
    print_difference(before.table, after.table, before.layers if a.is_dir() else after.layers)


def _sources(measured: MeasuredTraffic, path: Path) -> int:
    """The ranks that the load was measured on."""
    if measured.traffic_LRE.shape[1] == 1:
        raise UserError(f"{path} does not say on how many devices it was measured: give --ranks.")
    return measured.traffic_LRE.shape[1]


def _read(place: Path, step: int | None) -> _Known:
    """The table of a run or of a file."""
    check_step(place, step, fallback=False)
    from moe_jax.placement.files import read_table

    with explained_disk_errors(place):
        if place.is_dir():
            return _read_run(place, step)
        table = read_table(place, what="a placement table or a run's directory")
        return _Known(table, list(range(len(table.physical_to_logical))))


def _read_run(run: Path, step: int | None) -> _Known:
    """The table of a run's checkpoint, by default the newest, and what its config.yaml says."""
    require_run(run)
    from moe_jax.checkpoint.manager import Checkpoints
    from moe_jax.models.layer_pattern import layer_kinds
    from moe_jax.placement.table import Placement
    from moe_jax.tracking.run_dir import read_run_config

    config = read_run_config(run)
    checkpoints = Checkpoints(run / "checkpoints", 1, 0)
    steps = checkpoints.steps()
    if not steps or step not in (None, *steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(
            f"{run} has {wanted}: "
            + (f"there are {', '.join(map(str, steps))}." if steps else "train until it saves one.")
        )
    table = Placement.from_json(
        checkpoints.read_meta(steps[-1] if step is None else step)["placement"]
    )
    layers = [
        number for number, kind in enumerate(layer_kinds(config.model, config.moe)) if kind.moe
    ]
    return _Known(
        table,
        layers,
        config.mesh.size,
        config.mesh.tensor,
        config.placement.redundant_slots,
        config.moe.num_groups,
    )


# Each command: its name, its function and the example that its help ends with.
COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    ("plan", plan, "moe-jax placement plan runs/first --topology links.yaml --out plan.json"),
    ("show", show, "moe-jax placement show runs/first --layer 3"),
    ("diff", diff, "moe-jax placement diff runs/first planned.json"),
]
for _name, _command, _example in COMMANDS:
    app.command(_name, epilog=f"\b\nExample:\n  {_example}")(_command)
