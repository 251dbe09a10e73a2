"""One of two processes that save together and restore together; a test starts both.

    python -m tests.support.restoring_process RANK PORT DIRECTORY

DIRECTORY/one has a checkpoint of one process. Prints one line of JSON: which files this process
read to hash them, how many bytes of experts it read, what it was told and whether all was right.
"""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.checkpoint import integrity, orbax_io
from moe_jax.checkpoint.manager import Checkpoints, SlotSources
from moe_jax.errors import CorruptCheckpoint, UserError
from moe_jax.models.paths import ParameterPath
from moe_jax.placement.table import Placement, slot_sources

EXPERTS = "stacks/0/blocks/0/mlp/experts/down"
WIDTH = 128
# Which expert is in which slot, for two layers: on two ranks, on four, and with replicas.
ON_TWO = [[4, 1, 6, 3, 0, 5, 2, 7], [0, 1, 2, 3, 4, 5, 6, 7]]
ON_FOUR = [[7, 6, 5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4, 7, 6]]
REPLICAS = [[0, 1, 7, 2, 3, 6, 4, 5, 0, 6, 7, -1], [0, 4, 7, 1, 5, 6, 2, 6, -1, 3, 7, 0]]


def table(rows: list[list[int]], ranks: int) -> Placement:
    return Placement(np.array(rows), 8, ranks)


def values(placement: Placement, seed: int) -> dict[str, Any]:
    """A state of one block of experts with a moment, a matrix and a counter; random bits, which do
    not compress.
    """
    rng = np.random.default_rng(seed)

    def experts() -> np.ndarray:
        logical = rng.integers(0, 2**32, (2, 8, WIDTH, WIDTH), np.uint32)
        of_slot = np.maximum(placement.physical_to_logical, 0)[..., None, None]
        laid = np.take_along_axis(logical, of_slot, axis=1)
        laid[placement.physical_to_logical < 0] = 0
        return laid

    return {
        "params": {EXPERTS: experts()},
        "mu": {EXPERTS: experts()},
        "w": rng.integers(0, 2**32, (16, 8), np.uint32),
        "step": np.uint32(seed),
    }


def shardings(state: Any, mesh: Any) -> Any:
    specs = {4: PartitionSpec(None, "expert"), 2: PartitionSpec("expert"), 0: PartitionSpec()}
    return jax.tree.map(lambda x: NamedSharding(mesh, specs[np.ndim(x)]), state)


def put(state: Any, mesh: Any) -> Any:
    def one(array: Any, sharding: Any) -> jax.Array:
        return jax.make_array_from_callback(np.shape(array), sharding, lambda at: array[at])

    return jax.tree.map(one, state, shardings(state, mesh))


def target(state: Any, mesh: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s),
        state,
        shardings(state, mesh),
    )


def between(old: Placement, new: Placement) -> SlotSources:
    rows = slot_sources(old, new)
    return lambda path: rows if ParameterPath.parse(path).is_expert else None


def same(found: Any, expected: Any) -> bool:
    return jax.tree.all(
        jax.tree.map(
            lambda x, y: all(np.array_equal(s.data, y[s.index]) for s in x.addressable_shards),
            found,
            expected,
        )
    )


def bytes_read() -> int:
    """By tensorstore, in this process so far."""
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/")
    return sum(
        value["value"]
        for metric in metrics
        if metric["name"].endswith("/bytes_read")
        for value in metric["values"]
    )


class Watch:
    """What is hashed and which bytes of slots are read, since `take` was called last."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.slots = 0
        self._wrap(integrity, "_digest", lambda path, **_: self.files.append(str(path)))
        read: Callable[..., Any] = orbax_io.read_slots

        def counted(*arguments: Any) -> Any:
            before = bytes_read()
            arrays = read(*arguments)
            self.slots += bytes_read() - before
            return arrays

        setattr(orbax_io, "read_slots", counted)  # noqa: B010

    @staticmethod
    def _wrap(module: Any, name: str, note: Callable[..., Any]) -> None:
        real = getattr(module, name)

        def noting(*arguments: Any, **options: Any) -> Any:
            note(*arguments, **options)
            return real(*arguments, **options)

        setattr(module, name, noting)

    def take(self) -> list[str]:
        files, self.files, self.slots = sorted(self.files), [], 0
        return files


def failing_save(checkpoints: Checkpoints, rank: int, state: Any) -> tuple[str, float]:
    """What a process is told when the second one's disk is full, and after how long."""
    real, start = orbax_io.Writing.wait, time.monotonic()

    def full(self: Any) -> None:
        real(self)
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        setattr(orbax_io.Writing, "wait", full)  # noqa: B010
    told = ""
    try:
        checkpoints.save(3, state, {}, wait=True)
    except UserError as error:
        told = str(error)
    setattr(orbax_io.Writing, "wait", real)  # noqa: B010
    return told, time.monotonic() - start


def main(rank: int, port: int, root: Path) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))
    watch, out = Watch(), dict[str, Any]()
    placement = table(ON_FOUR, 4)
    checkpoints = Checkpoints(root / "two", keep_last=9, keep_best=0)
    for step in (1, 2):
        state = values(placement, step)
        checkpoints.save(step, put(state, mesh), {"step": step}, wait=True)
        out.setdefault("sealed", watch.take())

    out["told_of_save"], out["seconds"] = failing_save(checkpoints, rank, put(state, mesh))
    out["after_failure"] = [checkpoints.steps(), checkpoints.partial_steps()]
    watch.take()

    try:
        with checkpoints:
            checkpoints.save(4, put(state, mesh), {})
            raise UserError("the loss is not finite")  # on all, or on one alone: nobody can know
    except UserError as error:
        out["ended_with"], out["then"] = str(error), checkpoints.steps()
    multihost_utils.sync_global_devices("ended")
    checkpoints.save(2, put(state, mesh), {"step": 2}, wait=True)
    watch.take()

    step_2 = root / "two" / "step_00000002" / "state"
    damaged = max(step_2.rglob("d/*"), key=lambda path: path.stat().st_size)
    if rank == 0:
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    multihost_utils.sync_global_devices("damaged")
    as_saved = target(state, mesh)
    try:
        checkpoints.restore_latest(as_saved)
    except CorruptCheckpoint as error:
        out["told"] = str(error)
    watch.take()
    restored = checkpoints.restore_latest(as_saved, fallback=True)
    out["step"], out["same"] = restored.step, same(restored.state, values(placement, 1))
    watch.take()

    other = table(REPLICAS, 4)
    expected = values(other, 1)
    found = checkpoints.restore(1, target(expected, mesh), between(placement, other))
    out["slots"] = watch.slots
    out["moved"], out["verified"] = same(found, expected), watch.take()
    held = slot_sources(placement, other).reshape(2, 2, -1)[:, rank]
    distinct = sum(len(set(row) - {-1}) for row in held.tolist())
    out["share"] = 2 * distinct * 4 * WIDTH**2  # with the moment

    alone = Checkpoints(root / "one", keep_last=9, keep_best=0)
    found = alone.restore(7, target(expected, mesh), between(table(ON_TWO, 2), other))
    out["of_one"], out["verified_of_one"] = same(found, values(other, 7)), watch.take()
    print(json.dumps(out))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
