"""Opening a run's checkpoint on another mesh: experts keep their weights and moments, and are laid
out in the slots of another table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.checkpoint.read_state import SlotSources
from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.errors import CorruptCheckpoint, UserError
from moe_jax.models.layer_pattern import expert_layers
from moe_jax.models.paths import ParameterPath
from moe_jax.placement.table import Placement, slot_sources


def saved_placement(checkpoints: Checkpoints, step: int | None, fallback: bool) -> Placement:
    """The table of the newest readable checkpoint, as `saved_meta` finds it. Raises UserError where
    there is none.
    """
    saved = saved_meta(checkpoints, step, fallback)
    if saved is None:
        steps = checkpoints.steps()
        if steps:
            raise UserError(
                f"{checkpoints.directory} holds no checkpoint of step {step} (there are: "
                f"{', '.join(map(str, steps))}): choose another --step."
            )
        raise UserError(
            f"{checkpoints.directory} holds no checkpoint: train first, or name another run "
            f"directory."
        )
    return Placement.from_json(saved[1]["placement"])


def saved_meta(
    checkpoints: Checkpoints, step: int | None, fallback: bool
) -> tuple[int, dict[str, Any]] | None:
    """The newest readable checkpoint (that of `step`, if given) and what it holds beside arrays;
    None without checkpoints.

    Raises CorruptCheckpoint where the first one tried is damaged and `fallback` is not set, or all
    are.
    """
    damage = None
    for candidate in reversed(checkpoints.steps()):
        if step is not None and candidate > step:
            continue
        try:
            return candidate, checkpoints.read_meta(candidate)
        except CorruptCheckpoint as error:
            if not fallback:
                raise
            damage = error
    if damage is not None:
        raise damage
    return None


def sources_for(
    model: ModelConfig, moe: MoEConfig, placement: Placement
) -> Callable[[dict[str, Any]], SlotSources]:
    """From the meta of each checkpoint tried, which of its slots each slot of `placement` holds."""
    return lambda meta: between(model, moe, Placement.from_json(meta["placement"]), placement)


def between(model: ModelConfig, moe: MoEConfig, old: Placement, new: Placement) -> SlotSources:
    """Where the experts' arrays [repeats, P, ...] of one table are in those of another; all are
    left as they were stored where both say the same.
    """
    if np.array_equal(old.physical_to_logical, new.physical_to_logical):
        return lambda path: None
    sources_LP = slot_sources(old, new)
    layers = expert_layers(model, moe)

    def sources(path: str) -> np.ndarray | None:
        parsed = ParameterPath.parse(path)
        return sources_LP[np.array(layers[parsed.layer_block])] if parsed.is_expert else None

    return sources
