"""Sums between two real CPU processes, forked from one: python -m tests.support.scattering

Prints for each size and operation of how many tries the result was wrong, and whether the program
of our gather's transpose has a reduce-scatter, as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.parallel import collectives
from moe_jax.runtime.distributed import ProcessGroup, join_processes
from tests.support.forked import run_child

MIB = (1, 8)  # of f32 on each device, half of which a scatter leaves it
TRIES = 5
GROUPS = 4  # of two devices, which send at the same time, as in jax issue 40830


def scatter_ours(x: jax.Array) -> jax.Array:
    """The transpose of our gather: the sum over the ranks, a part on each."""
    own = jax.eval_shape(lambda y: lax.split(y, [len(y) // 2, len(y) // 2])[0], x)
    _, back = jax.vjp(
        lambda y: collectives.all_gather(y, "data", 0),
        collectives.vary(jax.numpy.zeros(own.shape, own.dtype), ("group", "data")),
    )
    return back(x)[0]


def _part(values: np.ndarray, at: Any) -> np.ndarray:
    return values[at]


OPERATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "ours": scatter_ours,
    "psum": lambda x: lax.psum(x, "data"),
    "psum_scatter": lambda x: lax.psum_scatter(x, "data", tiled=True),
}


def measure(rank: int, port: int, out: Path) -> None:
    jax.config.update("jax_num_cpu_devices", GROUPS)
    join_processes(ProcessGroup(f"127.0.0.1:{port}", 2, rank))
    devices = np.array(jax.devices()).reshape(2, GROUPS).T  # each group has one of each process
    mesh = Mesh(devices, ("group", "data"), axis_types=(AxisType.Auto,) * 2)
    rng, found = np.random.default_rng(0), dict[str, Any]()
    for size in MIB:
        # Whole numbers: their sum is the same in any order.
        values = rng.integers(0, 1000, (GROUPS, 2, size << 18)).astype(np.float32)
        held = NamedSharding(mesh, P("group", "data"))
        x = jax.make_array_from_callback(values.shape, held, partial(_part, values))
        total = values.sum(1)
        for name, operation in OPERATIONS.items():
            spec = P("group") if name == "psum" else P("group", "data")
            program = jax.jit(
                jax.shard_map(
                    lambda y, operation=operation: operation(y[0, 0])[None],
                    mesh=mesh,
                    in_specs=P("group", "data"),
                    out_specs=spec,
                )
            )
            compiled = program.lower(x).compile()
            wrong = 0
            for _ in range(TRIES):
                parts = compiled(x).addressable_shards
                wrong += not all(np.array_equal(part.data, total[part.index]) for part in parts)
            found[f"{name} {size}"] = wrong
            found[f"{name} has"] = "reduce-scatter" in (compiled.as_text() or "")
    out.write_text(json.dumps(found))


def run() -> None:
    jax.config.update("jax_platforms", "cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in (0, 1):
            if pid := os.fork():
                pids.append(pid)
            else:
                run_child(lambda name: measure(int(name), port, Path(folder) / name), str(rank))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert codes == [0, 0], codes
        print(json.dumps([json.loads((Path(folder) / name).read_text()) for name in "01"]))


if __name__ == "__main__":
    run()
