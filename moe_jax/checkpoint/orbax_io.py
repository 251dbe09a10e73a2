"""A state as arrays with names: written and read by Orbax, compared with what a model wants.

Everything that knows Orbax and tensorstore is here, their errors included (runtime/quiet.py hides
what they print of them).
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.errors import UserError
from moe_jax.models.paths import ParameterPath
from moe_jax.placement.table import EMPTY

# The largest piece of an array that is stored, in bytes: reading any part of a piece takes memory
# for all of it.
PIECE = 16 * 2**20
# How many slots a process reads at a time: an expert has about as many arrays, with its moments.
SLOTS_AT_ONCE = 4


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by their path, such as "opt_state/0/mu/embed", in tree order."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(flat) != len(pairs):
        raise ValueError(
            "two arrays of the state have the same path: do not use '/' in the keys of its dicts"
        )
    return flat


class Writing:
    """A state that is being written by all processes, each its own part."""

    def __init__(self, path: Path, arrays: dict[str, jax.Array]) -> None:
        """Copies the arrays to the host and begins to write them into the folder `path`.

        Once this returns the caller may donate the arrays: on CPU, where the copy is a view, JAX
        then leaves the viewed memory alone and gives the donated computation new memory.

        Orbax's handler is used without its Checkpointer, which waits for all processes while it
        writes: where one of them failed, the others would wait for minutes.
        """
        self._path = epath.Path(path)
        self._handler = ocp.PyTreeCheckpointHandler()
        args = ocp.args.PyTreeSave(
            arrays, {name: _layout(name, array.ndim) for name, array in arrays.items()}
        )
        # on a thread of its own, because a notebook's runs an event loop already
        with ThreadPoolExecutor(1) as thread:
            self._futures = thread.submit(
                asyncio.run, self._handler.async_save(self._path, args=args)
            ).result()

    def wait(self) -> None:
        """Waits until this process's part is written; raises what went wrong."""
        for future in self._futures or ():
            future.result()

    def merge(self) -> None:
        """Makes one store of the parts of all processes; by the first one, after all have
        written.
        """
        self._handler.finalize(self._path)
        self._handler.close()


def has_slots(name: str, ndim: int) -> bool:
    """Whether an array is [repeats, P, ...] with a row for each slot of an expert; some moments
    that stand for an expert's have fewer dims.
    """
    return ndim >= 2 and ParameterPath.parse(name).is_expert


def _layout(name: str, ndim: int) -> ocp.SaveArgs:
    """How an array is cut into the pieces that can be read one by one: each slot is its own."""
    return ocp.SaveArgs(chunk_byte_size=PIECE, shard_axes=(0, 1) if has_slots(name, ndim) else ())


def read(path: Path, asked: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read some of the arrays written at `path`, onto any mesh; those without elements were not
    stored.
    """
    full = {name: leaf for name, leaf in asked.items() if leaf.size}
    restore_args = ocp.checkpoint_utils.construct_restore_args(full)
    args = ocp.args.PyTreeRestore(item=full, restore_args=restore_args, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler()
    arrays = handler.restore(epath.Path(path), args=args) if full else {}
    handler.close()
    empty = {
        name: jax.numpy.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in asked.items()
        if not leaf.size
    }
    return arrays | empty


def read_slots(
    path: Path, asked: dict[str, jax.ShapeDtypeStruct], sources: dict[str, np.ndarray]
) -> dict[str, jax.Array]:
    """Arrays [R, P, ...] whose slots are others than those stored at `path`; `sources` says which
    stored slot is in each of their slots [R, P], EMPTY for zeros.

    Each process reads the slots of its own devices, each once, a few at a time; nothing else of an
    array is read or held.
    """
    # The index of all pieces is read once.
    context = tensorstore.Context({"cache_pool#index": {"total_bytes_limit": 100_000_000}})
    index = {"driver": "ocdbt", "base": f"file://{path}/", "cache_pool": "cache_pool#index"}
    arrays = {}
    for name, leaf in asked.items():
        spec = {"driver": "zarr", "kvstore": index | {"path": name}}
        store = tensorstore.open(spec, read=True, context=context).result()
        arrays[name] = _read_rows(store, leaf, sources[name])
    return arrays


def _read_rows(store: Any, leaf: jax.ShapeDtypeStruct, source_RP: np.ndarray) -> jax.Array:
    """One array of `read_slots`."""
    parts: dict[Any, np.ndarray] = {}  # by their bounds: devices that hold the same share one
    wanted: dict[Any, list[Any]] = defaultdict(list)  # of each stored slot: bounds within, target
    for at in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
        bounds = _bounds(at, leaf.shape)
        if bounds in parts:
            continue
        part = parts[bounds] = np.zeros([stop - start for start, stop in bounds], leaf.dtype)
        (repeat, _), (slot, _), *inner = bounds
        for i, j in np.ndindex(part.shape[:2]):
            if (source := int(source_RP[repeat + i, slot + j])) != EMPTY:
                wanted[repeat + i, source].append((inner, part[i, j]))

    reading: deque[Any] = deque()

    def fill_one() -> None:
        row, origin, targets = reading.popleft()
        for inner, target in targets:
            target[...] = row.result()[_slices(inner, origin)]

    for slot, targets in sorted(wanted.items()):
        dims = list(zip(*(inner for inner, _ in targets), strict=True))
        origin = [min(start for start, _ in dim) for dim in dims]
        stops = [max(stop for _, stop in dim) for dim in dims]
        box = (*slot, *map(slice, origin, stops))
        reading.append((store[box].read(), origin, targets))
        if len(reading) == SLOTS_AT_ONCE:
            fill_one()
    while reading:
        fill_one()
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda at: parts[_bounds(at, leaf.shape)]
    )


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Start and stop of each dim."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _slices(bounds: Any, origin: list[int]) -> tuple[slice, ...]:
    """Bounds as an index into an array that begins at `origin`."""
    return tuple(
        slice(start - first, stop - first)
        for (start, stop), first in zip(bounds, origin, strict=True)
    )


def match(
    path: Path,
    wanted: dict[str, Any],
    stored: dict[str, Any],
    moved: dict[str, np.ndarray],
    subset: bool,
) -> None:
    """Refuse the checkpoint of another model. `moved` are arrays with other slots."""
    other = "it is of another model, use the configuration that it was saved with."
    for name in sorted(wanted.keys() - stored.keys()):
        raise UserError(f"{path} has no array {name}: {other}")
    for name in () if subset else sorted(stored.keys() - wanted.keys()):
        raise UserError(f"{path} has an array {name} that the model does not: {other}")
    for name, leaf in wanted.items():
        shape, dtype = tuple(stored[name]["shape"]), stored[name]["dtype"]
        if dtype != str(leaf.dtype):
            raise UserError(
                f"array {name} of {path} is {dtype} where the model has {leaf.dtype}: {other}"
            )
        expected = shape
        if name in moved and len(shape) == leaf.ndim:
            expected = (shape[0], moved[name].shape[1], *shape[2:])
        if leaf.shape != expected:
            raise UserError(
                f"array {name} of {path} has shape {shape} where the model has {leaf.shape}: "
                f"{other}"
            )


def whole(leaf: jax.ShapeDtypeStruct, shape: list[int]) -> jax.ShapeDtypeStruct:
    """How to read an array in its stored shape, on every device."""
    if isinstance(leaf.sharding, NamedSharding):
        sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    else:
        sharding = leaf.sharding
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def explain(error: Exception, step: int, directory: Path) -> UserError | None:
    """A failed save in words, where the disk or its permissions are to blame; None for any other
    error.
    """
    quoted = re.search(
        r"os_error_code='(\d+)'", str(error)
    )  # tensorstore's ValueErrors quote the system's errors.
    if not isinstance(error, OSError) and quoted is None:
        return None
    number = error.errno if isinstance(error, OSError) else int(quoted[1]) if quoted else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {directory} is too full to save step {step}: free some space (earlier "
            f"checkpoints are intact)."
        )
    if number == errno.EROFS:
        return UserError(
            f"step {step} cannot be saved in {directory}, whose file system is read-only: name "
            f"another --run-dir (earlier checkpoints are intact)."
        )
    return UserError(
        f"step {step} cannot be saved in {directory} ({error}): see that it is writable (earlier "
        f"checkpoints are intact)."
    )
