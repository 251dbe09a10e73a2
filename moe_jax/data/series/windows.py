"""Windows of series for training: what came, and what is to be forecast.

    windows = SeriesWindows([mixup, kernel], weights=[9, 1], settings=WindowSettings(512, 64))
    batch = windows.batch(np.arange(0, 32))      # context f32 [32, 512], target f32 [32, 64]

The window at a place in the order follows from the place and the seed alone, so a place is all
that a checkpoint keeps, any number of processes read parts of one order, and there is no buffer to
shuffle in: series are drawn from all of a corpus. Corpora take turns in the exact proportions of
their weights; each goes through all its series, with a random cut of each, before one comes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moe_jax.data.mixture import place_in_mixture, whole_weights
from moe_jax.data.series.corpus import SeriesCorpus
from moe_jax.errors import UserError

if TYPE_CHECKING:
    import grain

_CUTS = 20  # that are tried of a series for one with a value in its context


class WindowSettings(NamedTuple):
    """What a window is, and which series give windows; the defaults are those of Chronos."""

    context_length: int
    prediction_length: int
    min_past: int = 64
    """Values before a cut, at least."""
    max_missing: float = 0.9
    """The share of missing values of a series, at most."""
    drop: float = 0.2
    """Augmentation: of each window a share that is drawn from [0, drop] is made missing."""
    held_out: float = 0.0
    """The share of the series that is kept for validation."""


class SeriesWindows:
    """Windows of several corpora without end."""

    def __init__(
        self,
        corpora: Sequence[SeriesCorpus],
        weights: Sequence[float] | None = None,
        *,
        settings: WindowSettings,
        seed: int = 0,
    ):
        """Weights may be in any scale, and are equal if not given.

        Raises UserError for a corpus without a series that is long and whole enough.
        """
        self.settings, self._seed, self._corpora = settings, seed, list(corpora)
        self._weights = whole_weights(weights or [1] * len(corpora))
        if len(self._weights) != len(corpora) or min(self._weights) < 0 or not any(self._weights):
            raise UserError(
                f"weights {weights} are not one positive number for each of {len(corpora)} corpora."
            )
        parts = [split_series(corpus, number, settings) for number, corpus in enumerate(corpora)]
        self._trained, self._held_out = zip(*parts, strict=True)
        self._orders = [
            _endless_order(len(series), seed + number)
            for number, series in enumerate(self._trained)
        ]

    @property
    def counts(self) -> tuple[int, int]:
        """Series to train on, and those that are held out."""
        return sum(map(len, self._trained)), sum(map(len, self._held_out))

    def batch(self, places: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The windows at these places: `context` f32 [B, context_length], with NaN before a series
        begins, and `target` f32 [B, prediction_length]; NaN where a value is missing.
        """
        return _stacked([self._window(int(place)) for place in places])

    def held_out(self, count: int) -> dict[str, np.ndarray]:
        """Validation: the last windows of the first `count` series that are held out, corpora in
        turn; nothing of them is dropped. As `batch`. There are fewer where no more are held out.
        """
        windows: list[tuple[np.ndarray, np.ndarray]] = []
        horizon = self.settings.prediction_length
        most = max(map(len, self._held_out))
        for turn in range(most):
            for corpus, held in zip(self._corpora, self._held_out, strict=True):
                if turn < len(held) and len(windows) < count:
                    one = int(held[turn])
                    length = len(corpus.part(one, 0, None))
                    windows.append(self._cut(corpus, one, length - horizon))
        if not windows:
            raise UserError("no series is held out: set a share of them.")
        return _stacked(windows)

    def _window(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        part, own = place_in_mixture(place, self._weights)
        corpus, rng = self._corpora[part], np.random.default_rng([self._seed, place])
        one = int(self._trained[part][self._orders[part][own]])
        last = len(corpus.part(one, 0, None)) - self.settings.prediction_length
        for _ in range(_CUTS):
            context, target = self._cut(
                corpus, one, int(rng.integers(self.settings.min_past, last + 1))
            )
            context, target = _dropped(context, target, rng, self.settings.drop)
            if not np.isnan(context).all():
                break
        return context, target

    def _cut(self, corpus: SeriesCorpus, one: int, cut: int) -> tuple[np.ndarray, np.ndarray]:
        """The values before and after a cut of a series."""
        size, horizon = self.settings.context_length, self.settings.prediction_length
        begin = max(cut - size, 0)
        values = corpus.part(one, begin, cut + horizon)
        context = np.full(size, np.nan, np.float32)
        context[size - (cut - begin) :] = values[: cut - begin]
        return context, np.array(values[cut - begin :])


def _dropped(
    context: np.ndarray, target: np.ndarray, rng: np.random.Generator, most: float
) -> tuple[np.ndarray, np.ndarray]:
    """The window with a random share of its values missing."""
    if not most:
        return context, target
    share = rng.uniform(0, most)
    context[rng.random(len(context)) < share] = np.nan
    target[rng.random(len(target)) < share] = np.nan
    return context, target


def _stacked(windows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    contexts, targets = zip(*windows, strict=True)
    return {"context": np.stack(contexts), "target": np.stack(targets)}


def split_series(
    corpus: SeriesCorpus, number: int, settings: WindowSettings
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the series to train on, and of those that are held out, of the corpus of a
    number. Raises UserError where none is to train on.
    """
    lengths = corpus.lengths()
    observed, before = corpus.observed(settings.prediction_length)
    needed = settings.min_past + settings.prediction_length
    usable = (lengths >= needed) & (observed >= (1 - settings.max_missing) * lengths) & (before > 0)
    # RandomState and not default_rng: numpy promises that its stream never changes.
    held = np.random.RandomState(number).random_sample(len(lengths)) < settings.held_out
    trained = np.flatnonzero(usable & ~held)
    if not len(trained):
        raise UserError(
            f"corpus {number + 1} has no series to train on: of its {len(lengths):,}, "
            f"{np.count_nonzero(lengths >= needed):,} have {needed} values (a past of "
            f"{settings.min_past} and a horizon of {settings.prediction_length})."
        )
    return trained, np.flatnonzero(usable & held)


def _endless_order(length: int, seed: int) -> grain.MapDataset[int]:
    import grain

    return grain.MapDataset.range(length).seed(seed % 2**32).shuffle().repeat()
