"""The series that a configuration names, as batches of windows for a forecaster.

    data = load_series(config.data, config.model.forecast, seed=0)
    batch = next(data.train_batches(global_batch=64))       # context [64, T], target [64, H]

A source is a folder of series, or `kernel:N`, the first N series of KernelSynth, which are made
once and kept in the cache; in a mixture it may be `mixup:N`, N series that TSMixup makes of the
other sources.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config.model import ForecastConfig
from moe_jax.config.schema import DataConfig
from moe_jax.data.corpus import process_rows
from moe_jax.data.packing import HostBatch
from moe_jax.data.prepare import make_once
from moe_jax.data.series.corpus import (
    SeriesCorpus,
    corpus_of,
    is_corpus,
    open_corpus,
    write_corpus,
)
from moe_jax.data.series.kernel_synth import LENGTH, kernel_synth
from moe_jax.data.series.mixup import Mixup, MixupSettings
from moe_jax.data.series.windows import SeriesWindows, WindowSettings, split_series
from moe_jax.errors import UserError
from moe_jax.runtime.compile_cache import cache_root
from moe_jax.utils.files import local_path
from moe_jax.utils.progress import with_progress

_MADE = re.compile(r"(kernel|mixup):([1-9][0-9]*)")


class SeriesData:
    """Training and validation windows of series."""

    tokenizer_hash = ""  # there is no tokenizer

    def __init__(self, windows: SeriesWindows, corpus_hash: str):
        self.windows, self.hash = windows, corpus_hash

    @property
    def size_text(self) -> str:
        """How many series there are, in a sentence."""
        trained, held_out = self.windows.counts
        return f"{trained:,} series to train on, {held_out:,} held out."

    def sample_prompt(self) -> None:
        """Nothing: a forecaster writes no text."""

    def train_batches(
        self, global_batch: int, process_index: int = 0, process_count: int = 1
    ) -> SeriesBatches:
        """Batches without end; arguments and state are those of a text's."""
        rows = process_rows(global_batch, process_index, process_count)
        return SeriesBatches(self.windows, global_batch, rows)

    def validation_batches(
        self, global_batch: int, count: int, process_index: int = 0, process_count: int = 1
    ) -> list[HostBatch]:
        """`count` batches of the ends of held-out series. Raises UserError where too few are."""
        rows = process_rows(global_batch, process_index, process_count)
        wanted, held_out = count * global_batch, self.windows.counts[1]
        if held_out < wanted:
            raise UserError(
                f"data.validation_fraction holds out {held_out} series but a validation needs "
                f"{wanted} (train.eval_batches x train.global_batch): raise "
                f"data.validation_fraction, give more series, or lower train.eval_batches."
            )
        whole = self.windows.held_out(wanted)
        return [
            {name: part[number * global_batch :][rows] for name, part in whole.items()}
            for number in range(count)
        ]


class SeriesBatches:
    """This process's rows of batches without end; the number of batches given is all their
    state.
    """

    def __init__(self, windows: SeriesWindows, global_batch: int, rows: slice):
        self._windows, self._size, self._rows, self._next = windows, global_batch, rows, 0

    def __next__(self) -> HostBatch:
        first = self._next * self._size
        self._next += 1
        return self._windows.batch(np.arange(first, first + self._size)[self._rows])

    def get_state(self) -> dict[str, Any]:
        """The position."""
        return {"batches": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        self._next = int(state["batches"])


class _Source(NamedTuple):
    """One of the sources, by the key that names it."""

    key: str
    name: str
    weight: float


def load_series(
    data: DataConfig,
    forecast: ForecastConfig,
    seed: int,
    tell: Callable[[str], None] | None = None,
) -> SeriesData:
    """The series that the configuration names, made where they are not there yet; `tell` is called
    with a line before what may take long.

    Raises UserError for a source that is no series, and for one without any long enough.
    """
    sources = [
        _Source(f"data.mixture[{number}].source", part.source, part.weight)
        for number, part in enumerate(data.mixture)
    ] or [_Source("data.source", data.source, 1.0)]
    settings = WindowSettings(
        forecast.context_length,
        forecast.prediction_length,
        min_past=data.min_past,
        drop=data.drop,
        held_out=data.validation_fraction,
    )
    corpora = {
        number: _open(source, tell or (lambda line: None))
        for number, source in enumerate(sources)
        if not source.name.startswith("mixup:")
    }
    mixed = {
        number: _mix(source, corpora, settings)
        for number, source in enumerate(sources)
        if number not in corpora
    }
    ordered = [part for _, part in sorted((corpora | mixed).items())]
    try:
        windows = SeriesWindows(
            ordered, [source.weight for source in sources], settings=settings, seed=seed
        )
    except UserError as error:
        numbered = re.sub(
            r"^corpus (\d+)", lambda found: _shown(sources[int(found[1]) - 1]), str(error)
        )
        raise UserError(numbered) from error
    digest = hashlib.sha256(" ".join(part.fingerprint() for part in ordered).encode())
    return SeriesData(windows, digest.hexdigest())


def _shown(source: _Source) -> str:
    return f"{source.key}={source.name}"


def _open(source: _Source, tell: Callable[[str], None]) -> SeriesCorpus:
    """A folder of series, or those of KernelSynth."""
    made = _MADE.fullmatch(source.name)
    if made is None:
        if not is_corpus(local_path(source.name)):
            raise UserError(
                f"{_shown(source)} is no corpus of series, which a forecaster is trained on: name "
                f"kernel:1000, or a folder that moe-jax synth or moe-jax data series wrote."
            )
        return open_corpus(local_path(source.name))
    count, root = int(made[2]), cache_root()
    if root is None:
        tell(f"Making {_shown(source)}.")
        return corpus_of(kernel_synth(count))
    folder = root / "series" / f"kernel-{count}-{LENGTH}"
    if not is_corpus(folder):
        tell(f"Making {_shown(source)} once, in {folder}.")
        make_once(folder, lambda: _write_kernels(folder, count))
    return open_corpus(folder)


def _write_kernels(folder: Path, count: int) -> None:
    series = with_progress("KernelSynth", kernel_synth(count), count)
    write_corpus(folder, series, {"synth": "kernel", "seed": 0, "length": LENGTH})


def _mix(
    source: _Source, corpora: dict[int, SeriesCorpus], settings: WindowSettings
) -> SeriesCorpus:
    """TSMixup of the other sources' series, those that are held out left aside."""
    made = _MADE.fullmatch(source.name)
    if made is None or not corpora:
        raise UserError(
            f"{_shown(source)} mixes the series of other sources: write mixup:1000 beside them in "
            f"data.mixture."
        )
    trained = [split_series(corpus, number, settings)[0] for number, corpus in corpora.items()]
    longest = settings.context_length + settings.prediction_length
    shortest = settings.min_past + settings.prediction_length
    mixup = Mixup(
        [*corpora.values()],
        MixupSettings(shortest=shortest, longest=max(2 * longest, shortest)),
        only=trained,
    )
    return corpus_of(mixup.first(int(made[2])))
