"""One of two processes that save together and restore what is then damaged; a test starts both.

    python -m tests.support.restoring_process RANK PORT DIRECTORY

Prints one line of JSON: how often this process read files to verify them, what it was told of the
damaged step, and what it restored instead.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.checkpoint import integrity
from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.errors import CorruptCheckpoint


def scaled(values: np.ndarray, factor: int, index: Any) -> np.ndarray:
    """A part of the values times a factor."""
    return values[index] * factor


def main(rank: int, port: int, directory: Path) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    values = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    checkpoints = Checkpoints(directory, keep_last=2, keep_best=0)
    for step in (1, 2):
        array = jax.make_array_from_callback(values.shape, sharding, partial(scaled, values, step))
        checkpoints.save(step, {"w": array}, {"step": step}, wait=True)
    damaged = sorted(path for path in (directory / "step_00000002" / "state").rglob("d/*"))[0]
    if rank == 0:
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    multihost_utils.sync_global_devices("damaged")

    verified: list[Path] = []
    verify = integrity.verify_directory

    def noting(path: Path, manifest: Any) -> None:
        verified.append(path)
        verify(path, manifest)

    module: Any = integrity
    module.verify_directory = noting
    target = {"w": jax.ShapeDtypeStruct(values.shape, np.float32, sharding=sharding)}
    told = ""
    try:
        checkpoints.restore_latest(target)
    except CorruptCheckpoint as error:
        told = str(error)
    restored = checkpoints.restore_latest(target, fallback=True)
    same = all(
        np.array_equal(shard.data, values[shard.index])
        for shard in restored.state["w"].addressable_shards
    )
    print(
        json.dumps({"verified": len(verified), "told": told, "step": restored.step, "same": same})
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
