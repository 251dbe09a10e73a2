"""Windows of several texts in exact proportions, or of one.

    train = Mixture([code, prose], weights=[1, 2.5])
    train.endless_order(seed)      # a grain dataset of window numbers

Which text gives a window follows from its place in the order alone: after every 7 windows of that
mixture 2 are of the code and 5 of the prose, and up to any place each of n texts has its share to
within less than n windows. Each text goes through all its windows before one comes again, in an
order of its own. So a place in the order is all that a checkpoint keeps, for any number of
processes.

Not `grain.MapDataset.mix`: it rounds proportions to hundredths of the smallest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from moe_jax.data.packing import HostBatch, Packed

if TYPE_CHECKING:
    import grain

_ENDLESS = 1 << 62
# Windows up to which a whole permutation is drawn for validation, as it always was.
_DRAWN = 1 << 24


class Mixture:
    """Texts whose windows are numbered one text after another; `len` is their number."""

    def __init__(self, parts: Sequence[Packed], weights: Sequence[float] = (1,)):
        self.parts = tuple(parts)
        self.weights = whole_weights(weights)
        self._bases = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self._bases[-1])

    @property
    def size(self) -> int:
        """Tokens."""
        return sum(part.size for part in self.parts)

    def batch(self, windows: np.ndarray) -> HostBatch:
        """The batch whose rows are these windows; see `Packed.batch`."""
        owner = np.searchsorted(self._bases, windows, side="right") - 1
        whole: HostBatch = {}
        for number in np.unique(owner).tolist():
            rows = owner == number
            batch = self.parts[number].batch(windows[rows] - self._bases[number])
            for name, values in batch.items():
                whole.setdefault(name, np.empty((len(windows), *values.shape[1:]), values.dtype))
                whole[name][rows] = values
        return whole

    def endless_order(self, seed: int) -> grain.MapDataset[int]:
        """Window numbers without end: every epoch of a text has all its windows, in an order drawn
        from the seed. It is computed from the place, and takes no memory.
        """
        import grain

        orders = [
            grain.MapDataset.source(range(begin, begin + len(part)))
            .seed((seed + number) % 2**32)
            .shuffle()
            .repeat()
            for number, (begin, part) in enumerate(
                zip(self._bases.tolist(), self.parts, strict=False)
            )
        ]
        return (
            orders[0] if len(orders) == 1 else grain.MapDataset.source(_Mixed(orders, self.weights))
        )

    def fixed_order(self, count: int) -> np.ndarray:
        """The first `count` windows of an order that is always the same, [count]; the texts must
        have enough of them (`shares`).
        """
        orders = [_permuted(len(part)) for part in self.parts]
        places = (place_in_mixture(place, self.weights) for place in range(count))
        return np.array([self._bases[part] + orders[part][own] for part, own in places])

    def shares(self, count: int) -> list[tuple[Packed, int]]:
        """The texts, and how many of the first `count` windows each gives."""
        given = [place_in_mixture(place, self.weights)[0] for place in range(count)]
        return [(part, given.count(number)) for number, part in enumerate(self.parts)]


class _Mixed:
    """The source of the orders of several texts, for grain."""

    def __init__(self, orders: list[grain.MapDataset[int]], weights: tuple[int, ...]):
        self.orders, self.weights = orders, weights

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, place: int) -> int:
        part, own = place_in_mixture(place, self.weights)
        return self.orders[part][own]


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportions of weights as they are written: 0.1 is a
    tenth.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return tuple(number // math.gcd(*whole) for number in whole)


def place_in_mixture(place: int, weights: tuple[int, ...]) -> tuple[int, int]:
    """Which part gives the window at a place in the order, and which of its own windows in turn it
    is.

    Each part but the last takes its share of what those before it left, rounded up: its count
    among the first n goes up at its places.
    """
    left, after, rest = place, place + 1, sum(weights)
    for part, weight in enumerate(weights):
        other, other_after = (count * (rest - weight) // rest for count in (left, after))
        if left - other != after - other_after:
            return part, left - other
        left, after, rest = other, other_after, rest - weight
    raise AssertionError(weights)  # the last part takes all that is left


def _permuted(length: int) -> np.ndarray | grain.MapDataset[int]:
    if length <= _DRAWN:
        # RandomState and not default_rng: numpy promises that its stream never changes.
        return np.random.RandomState(0).permutation(length)
    import grain

    return grain.MapDataset.range(length).seed(0).shuffle()
