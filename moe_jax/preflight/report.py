"""The result of a preflight as tables for a person."""

from __future__ import annotations

from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from moe_jax.preflight.bounds import link_of, time_bound
from moe_jax.preflight.job import Preflight
from moe_jax.preflight.measure import Measured
from moe_jax.utils.units import duration, si

GB = 1e9


def print_tables(result: Preflight) -> None:
    """Memory of all programs, then the collectives of each."""
    console, chip = Console(), result.target.chip
    estimated = ", estimated by XLA:CPU's programs" if result.target.estimated else ""
    console.print(
        f"{len(result.target.devices)} x {chip.name}, {chip.memory / GB:.1f} GB each{estimated}"
    )
    console.print(_memory_table(result))
    for part in result.parts:
        for program in part.programs:
            if program.collectives:
                console.print(_collectives_table(program, result, part.mesh))
            if program.flops and not program.refused:
                console.print(_bound_text(program, result, part.mesh))
    console.print("It fits." if result.fits else "It does not fit.")
    for remedy in result.remedies:
        console.print(f"- {remedy}")


def _bound_text(program: Measured, result: Preflight, mesh: Mesh) -> str:
    """The lower bound of a program's time, and what it assumes."""
    bound, chip = time_bound(program, result.target, mesh), result.target.chip
    return (
        f"{program.name}: at least {1e3 * bound.seconds:.3g} ms, by {bound.by} "
        f"(a bound, not an estimate: FLOPs {1e3 * bound.flops:.3g} ms at {si(chip.flops)}FLOP/s, "
        f"memory {1e3 * bound.memory:.3g} ms at {si(chip.memory_rate)}B/s, links "
        f"{1e3 * bound.links:.3g} ms at {si(chip.links)}B/s per device, of that exposed "
        f"{1e3 * bound.exposed:.3g} ms)."
    )


def _memory_table(result: Preflight) -> Table:
    table = Table(title="GB per device", title_justify="left")
    table.add_column("program")
    for name in ("arguments", "results", "temporaries", "peak", "compiled in"):
        table.add_column(name, justify="right")
    table.add_column("")
    for one in result.programs:
        if one.refused:
            seconds = duration(one.compile_seconds)
            table.add_row(one.name, *"----", seconds, f"does not fit: {one.refused}")
            continue
        sizes = (one.argument_bytes, one.output_bytes, one.temp_bytes, one.peak_bytes)
        fits = "fits" if one.fits(result.target.chip.memory) else "does not fit"
        cells = (f"{size / GB:.2f}" for size in sizes)
        table.add_row(one.name, *cells, duration(one.compile_seconds), fits)
    return table


def _collectives_table(program: Measured, result: Preflight, mesh: Mesh) -> Table:
    table = Table(title=f"{program.name}: what each device sends", title_justify="left")
    table.add_column("collective")
    table.add_column("axes")
    table.add_column("on")
    for name in ("times", "MB", "hidden"):
        table.add_column(name, justify="right")
    for sent in program.collectives:
        times = f"{sent.times}{' or more' if sent.dynamic else ''}"
        hidden = sent.hidden_bytes / sent.bytes if sent.bytes else 0.0
        link = link_of(sent, result.target.chip, mesh).name
        size = f"{sent.bytes / 1e6:,.1f}"
        table.add_row(sent.kind, " x ".join(sent.axes), link, times, size, f"{hidden:.0%}")
    return table
