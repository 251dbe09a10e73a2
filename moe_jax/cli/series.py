"""The commands that make series to train on: synth kernel, synth mixup and data series; `main.py`
and `data.py` add them to `moe-jax`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_jax.cli.console import explained_disk_errors
from moe_jax.cli.forecasting import Plot, Seed, TableFlags, as_options, check_outputs, save_figure
from moe_jax.cli.options import path_argument, path_option, spread
from moe_jax.utils.files import refuse_existing
from moe_jax.utils.progress import say, with_progress

if TYPE_CHECKING:
    import numpy as np

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Make up time series to train on."
)

SeriesCount = Annotated[int, typer.Option("--series", metavar="N", min=1, help="How many.")]
CorpusOut = Annotated[
    Path, path_option("--out", metavar="FOLDER", help="Folder to write; it must not exist.")
]


@app.command(epilog="\b\nExample:\n  moe-jax synth kernel --series 1000 --out corpus")
def kernel(
    out: CorpusOut,
    series: SeriesCount = 10_000,
    length: Annotated[
        int, typer.Option("--length", metavar="N", min=8, help="Values per series.")
    ] = 1024,
    seed: Seed = 0,
    plot: Plot = None,
) -> None:
    """Draw series from Gaussian processes (KernelSynth)."""
    refuse_existing(out)
    check_outputs({"--plot": plot}, {"--out": out})
    from moe_jax.data.series.kernel_synth import kernel_synth

    made_by = {"synth": "kernel", "seed": seed, "length": length}
    _write(out, kernel_synth(series, seed=seed, length=length), series, made_by, plot)


@app.command(
    epilog="\b\nExample:\n  moe-jax synth mixup --source hourly --source daily --series 1000 "
    "--out corpus"
)
def mixup(
    out: CorpusOut,
    source: Annotated[
        list[Path],
        path_option("--source", metavar="CORPUS", help="Folder of series; may be repeated."),
    ],
    series: SeriesCount = 10_000,
    most: Annotated[
        int, typer.Option("--most", metavar="K", min=1, help="Series in a mixture, at most.")
    ] = 3,
    alpha: Annotated[
        float,
        typer.Option("--alpha", metavar="A", min=0.001, help="Larger: weights more equal."),
    ] = 1.5,
    min_length: Annotated[
        int, typer.Option("--min-length", metavar="N", min=1, help="Values, at least.")
    ] = 128,
    max_length: Annotated[
        int, typer.Option("--max-length", metavar="N", min=1, help="Values, at most.")
    ] = 2048,
    seed: Seed = 0,
    plot: Plot = None,
) -> None:
    """Mix parts of real series (TSMixup)."""
    from moe_jax.errors import UserError

    if max_length < min_length:
        raise UserError(f"--max-length {max_length} is less than --min-length {min_length}.")
    refuse_existing(out)
    check_outputs({"--plot": plot}, {"--out": out})
    from moe_jax.data.series.corpus import open_corpus
    from moe_jax.data.series.mixup import Mixup, MixupSettings

    settings = MixupSettings(most, alpha, min_length, max_length)
    mixed = Mixup([open_corpus(path) for path in source], settings, seed)
    made_by = {"synth": "mixup", "seed": seed, **settings._asdict(), "sources": [*map(str, source)]}
    _write(out, mixed.first(series), series, made_by, plot)


@spread
def store(
    data: Annotated[Path, path_argument("DATA", help="CSV or parquet file of series.")],
    out: Annotated[Path, path_argument("OUT", help="Folder to write; it must not exist.")],
    *,
    table: TableFlags,
) -> None:
    """Store the series of DATA in the new folder OUT, to train on.

    Each target of each item becomes a series.
    """
    refuse_existing(out)
    with as_options(), explained_disk_errors(out):
        from moe_jax.data.series.corpus import write_corpus
        from moe_jax.forecasting.tables.items import regular_items
        from moe_jax.forecasting.tables.read import read_series
        from moe_jax.forecasting.tables.steps import named_steps

        given = None if table.freq is None else named_steps(table.freq)
        series = read_series(data, table.columns, table.layout).items
        items = regular_items(series, given, fill_gaps=table.fill_gaps)
        values = (target for item, _ in items for target in item.targets.values())
        count = write_corpus(out, values, {"file": str(data)})
    print(f"{count:,} series in {out}")


def _write(
    out: Path,
    series: Iterator[np.ndarray],
    count: int,
    made_by: Mapping[str, Any],
    plot: Path | None,
) -> None:
    """Writes a corpus, and draws its first series."""
    from moe_jax.data.series.corpus import open_corpus, write_corpus

    shown: Iterable[np.ndarray] = with_progress(f"Writing {out}", series, count)
    with explained_disk_errors(out):
        write_corpus(out, shown, made_by)
    if plot is not None:
        from moe_jax.forecasting.figures import series_figure

        corpus = open_corpus(out)
        with explained_disk_errors(plot):
            save_figure(series_figure([corpus[number] for number in range(min(count, 12))]), plot)
    say(f"{count:,} series in {out}" + (f"; a picture of some in {plot}" if plot else ""))
