"""TSMixup (arXiv 2403.07815, algorithm 1): weighted sums of parts of up to three real series.

Each part is divided by its mean absolute value; the weights are drawn from a Dirichlet
distribution. With one part, a third of the time, a series stays as it is up to its scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.data.series.corpus import SeriesCorpus
from moe_jax.errors import UserError


class MixupSettings(NamedTuple):
    """Those of the paper."""

    most: int = 3
    """Series that are mixed, at most."""
    alpha: float = 1.5
    """Of the Dirichlet distribution: larger ones make more equal weights."""
    shortest: int = 128
    longest: int = 2048


class Mixup:
    """Mixed series by number; the same for the same seed, whichever are made beside them."""

    def __init__(
        self,
        corpora: Sequence[SeriesCorpus],
        settings: MixupSettings = MixupSettings(),  # noqa: B008 - it cannot be changed
        seed: int = 0,
        only: Sequence[np.ndarray] | None = None,
    ):
        """`only` has the numbers of the series of each corpus that may be mixed.

        Raises UserError for a corpus without a series that is long enough.
        """
        self._corpora, self.settings, self._seed = list(corpora), settings, seed
        self._lengths = [corpus.lengths() for corpus in corpora]
        self._long = [np.flatnonzero(own >= settings.shortest) for own in self._lengths]
        if only is not None:
            self._long = [np.intersect1d(*both) for both in zip(self._long, only, strict=True)]
        for number, long in enumerate(self._long):
            if not len(long):
                raise UserError(
                    f"source {number + 1} has no series of {settings.shortest} values: give a "
                    f"smaller --min-length, or leave it out."
                )

    def series(self, number: int) -> np.ndarray:
        """A mixed series, f32 [T]; a value that one of its parts lacks is missing.

        T is drawn, and is that of the shortest part where one is shorter.
        """
        rng, settings = np.random.default_rng([self._seed, number]), self.settings
        count = int(rng.integers(1, settings.most + 1))
        length = int(rng.integers(settings.shortest, settings.longest + 1))
        chosen = []
        for corpus in rng.integers(len(self._corpora), size=count):
            one = int(rng.choice(self._long[corpus]))
            chosen.append((int(corpus), one))
            length = min(length, int(self._lengths[corpus][one]))
        mixed = np.zeros(length)
        for (corpus, one), weight in zip(
            chosen, rng.dirichlet([settings.alpha] * count), strict=True
        ):
            begin = int(rng.integers(self._lengths[corpus][one] - length + 1))
            part = self._corpora[corpus].part(one, begin, begin + length).astype(np.float64)
            observed = part[~np.isnan(part)]
            scale = np.abs(observed).mean() if observed.size else 0.0
            mixed += weight * (part / scale if scale > 0 else part)
        return mixed.astype(np.float32)

    def first(self, count: int) -> Iterator[np.ndarray]:
        """The first `count` of them, one at a time."""
        return map(self.series, range(count))
