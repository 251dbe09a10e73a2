"""The commands data prepare, verify and series; `main.py` adds them to `moe-jax`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from moe_jax.cli import series
from moe_jax.cli.console import explained_disk_errors
from moe_jax.cli.model_options import one_of
from moe_jax.cli.options import Out, option, path_argument
from moe_jax.errors import UserError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Prepare data once, for runs.")

# How the settings that `prepare` takes are called there.
_SETTINGS = "tokenizer|text_field|split|loss_on|validation_fraction"


@app.command(epilog="\b\nExample:\n  moe-jax data prepare texts prepared --tokenizer bytes")
def prepare(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", show_default=False, help="As data.source.")
    ],
    out: Out,
    tokenizer: Annotated[str, option("--tokenizer", metavar="T", help="As data.tokenizer.")],
    workers: Annotated[
        int | None,
        option("--workers", metavar="N", min=1, help="Processes.  [default: one per core]"),
    ] = None,
    text_field: Annotated[str, typer.Option(metavar="NAME", help="As data.text_field.")] = "text",
    split: Annotated[str, typer.Option(metavar="NAME", help="As data.split.")] = "train",
    loss_on: Annotated[
        str, typer.Option(metavar="WHAT", help="assistant or all, as data.loss_on.")
    ] = "assistant",
    validation_fraction: Annotated[
        float, typer.Option(metavar="F", help="The split to store; runs may use any.")
    ] = 0.05,
) -> None:
    """Tokenize SOURCE once into the new folder OUT, for data.source.

    Killed, the same command goes on where it stopped.
    """
    with _as_options(), explained_disk_errors(out):
        one_of("--loss-on", loss_on, ("assistant", "all"))
        from moe_jax.config.schema import DataConfig
        from moe_jax.data import prepare as job

        config = DataConfig(
            source=source,
            tokenizer=tokenizer,
            text_field=text_field,
            split=split,
            loss_on="all" if loss_on == "all" else "assistant",
            validation_fraction=validation_fraction,
        )
        began = time.perf_counter()
        index = job.prepare(config, out, workers or os.cpu_count() or 1)
        tokens = sum(shard["tokens"] for shard in index["shards"])
        print(
            f"{tokens:,} tokens of {index['documents']:,} documents in {out}, in "
            f"{time.perf_counter() - began:,.1f} s. To train on it: --set data.source={out} "
            f"--set data.tokenizer={tokenizer}"
        )


@app.command(epilog="\b\nExample:\n  moe-jax data verify prepared")
def verify(
    folder: Annotated[Path, path_argument("FOLDER", help="What data prepare wrote.")],
) -> None:
    """Compare every file of a prepared folder with its hash."""
    from moe_jax.data.prepared import is_prepared, verify_prepared
    from moe_jax.utils.progress import byte_progress
    from moe_jax.utils.units import gibibytes

    with explained_disk_errors(folder):
        if not is_prepared(folder):
            raise UserError(f"{folder} is no folder that moe-jax data prepare wrote: name one.")
        total = sum(file.stat().st_size for file in folder.iterdir())
        with byte_progress(f"Verifying {folder}", total) as progress:
            for done in verify_prepared(folder):
                progress(done)
        print(f"{folder} is whole: {gibibytes(total)}.")


app.command(
    "series",
    epilog="\b\nExample:\n  moe-jax data series m4_hourly_train.csv hourly --layout rows",
)(series.store)


@contextmanager
def _as_options() -> Iterator[None]:
    """Errors that name settings name them as they are typed here."""
    try:
        yield
    except UserError as error:
        text = re.sub(
            rf"\bdata\.({_SETTINGS})\b", lambda m: "--" + m[1].replace("_", "-"), str(error)
        )
        raise UserError(re.sub(r"\bdata\.source\b", "SOURCE", text)) from error
