"""The arrays of a saved step on any mesh and in any slots, each compared with its checksum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint import agreement, integrity, orbax_io
from moe_jax.errors import CorruptCheckpoint
from moe_jax.moe.slots import take_slots

# For an array's path, such as "opt_state/0/mu/stacks/0/blocks/0/mlp/experts/down", the stored slot
# that each slot of the target holds, int32 [repeats, P] with EMPTY; None where it is laid out as it
# was stored.
SlotSources = Callable[[str], np.ndarray | None]


def moved_slots(wanted: dict[str, Any], sources: SlotSources | None) -> dict[str, np.ndarray]:
    """The arrays of `wanted` with other slots than those stored, and which ones."""
    if sources is None:
        return {}
    rows = {
        name: sources(name)
        for name, leaf in wanted.items()
        if orbax_io.has_slots(name, leaf.ndim) and leaf.size
    }
    return {name: source_RP for name, source_RP in rows.items() if source_RP is not None}


def read_proven(
    path: Path, wanted: dict[str, Any], stored: dict[str, Any], moved: dict[str, np.ndarray]
) -> dict[str, jax.Array]:
    """The arrays, each process its devices' parts, compared with their checksums."""
    state, damaged = path / "state", []

    def prove(name: str, array: jax.Array, source_RP: np.ndarray | None = None) -> None:
        if not integrity.agrees(array, stored[name], source_RP):
            damaged.append(name)

    def refuse() -> None:
        for name in damaged:
            raise CorruptCheckpoint(
                f"array {name} of {path} does not hold the values that were saved"
            )

    # Since there are checksums of slots, each slot is a piece of its own and known to be right by
    # itself. It is read once; Orbax may read a piece for each device that needs some of it.
    by_slot = {
        name: moved[name] if name in moved else _in_place(leaf)
        for name, leaf in wanted.items()
        if "slots" in stored[name] and leaf.size
    }
    asked = {name: wanted[name] for name in by_slot}
    arrays = agreement.by_all(lambda: orbax_io.read_slots(state, asked, by_slot))
    rest = {name: leaf for name, leaf in wanted.items() if name not in {*by_slot, *moved}}
    arrays |= agreement.by_all(lambda: orbax_io.read(state, rest))
    for name, array in arrays.items():
        prove(name, array, by_slot.get(name))
    for name in sorted(moved.keys() - by_slot.keys()):
        leaf = orbax_io.whole(wanted[name], stored[name]["shape"])
        whole = agreement.by_all(functools.partial(orbax_io.read, state, {name: leaf}))[name]
        prove(name, whole)
        arrays[name] = jax.device_put(take_slots(whole, moved[name]), wanted[name].sharding)
    agreement.by_all(refuse)
    return arrays


def _in_place(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """The slots as they are stored, [repeats, P]."""
    return np.broadcast_to(np.arange(leaf.shape[1]), leaf.shape[:2])
