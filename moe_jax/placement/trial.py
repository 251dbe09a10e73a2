"""Whether a plan can be believed: one made by a window's first half is tried on its second, which
it did not see. While routers drift, or loads only seem uneven, nothing gains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe_jax.placement.table import Placement


class Trial(NamedTuple):
    """What came of a trial."""

    table: Placement
    """What was planned by the first half."""
    better_L: np.ndarray
    """Which layers would have gained enough by it in the second."""


def try_plan(
    plan: Callable[[np.ndarray, Placement], Placement],
    worth: Callable[[Placement, np.ndarray], np.ndarray],
    halves: tuple[np.ndarray, np.ndarray],
    present: Placement,
    min_gain: float,
) -> Trial:
    """Plans by the first of two traffics [L, R, E] and looks at the second.

    `worth` gives what is to be small by layer; a layer gains if it falls by `min_gain` of it.
    """
    first_LRE, second_LRE = halves
    table = plan(first_LRE, present)
    wanted_L = (1 - min_gain) * worth(present, second_LRE)
    return Trial(table, worth(table, second_LRE) < wanted_L)


def mix_layers(from_new_L: np.ndarray, new: Placement, old: Placement) -> Placement:
    """The new table in those layers, the old one in the others."""
    return Placement(
        np.where(from_new_L[:, None], new.physical_to_logical, old.physical_to_logical),
        old.num_experts,
        old.ranks,
    )
