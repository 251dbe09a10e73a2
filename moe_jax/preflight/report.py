"""The result of a preflight as tables for a person."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from moe_jax.preflight.job import Preflight
from moe_jax.preflight.measure import Measured
from moe_jax.utils.units import duration

GB = 1e9


def print_tables(result: Preflight) -> None:
    """Memory of all programs, then the collectives of each."""
    console, chip = Console(), result.target.chip
    estimated = ", estimated by XLA:CPU's programs" if result.target.estimated else ""
    console.print(
        f"{len(result.target.devices)} x {chip.name}, {chip.memory / GB:.1f} GB each{estimated}"
    )
    console.print(_memory_table(result))
    for program in result.programs:
        if program.collectives:
            console.print(_collectives_table(program))
    console.print("The run fits." if result.fits else "The run does not fit.")


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


def _collectives_table(program: Measured) -> Table:
    table = Table(title=f"{program.name}: what each device sends", title_justify="left")
    table.add_column("collective")
    table.add_column("axes")
    for name in ("times", "MB", "hidden"):
        table.add_column(name, justify="right")
    for sent in program.collectives:
        times = f"{sent.times}{' or more' if sent.dynamic else ''}"
        hidden = sent.hidden_bytes / sent.bytes if sent.bytes else 0.0
        table.add_row(
            sent.kind, " x ".join(sent.axes), times, f"{sent.bytes / 1e6:,.1f}", f"{hidden:.0%}"
        )
    return table
