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
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.parallel import collectives
from moe_jax.runtime.distributed import ProcessGroup, join_processes
from tests.support.forked import run_child

MIB = (1, 4, 16)  # of f32, on each process
TRIES = 5


def scatter_ours(x: jax.Array) -> jax.Array:
    """The transpose of our gather: the sum over the ranks, a part on each."""
    own = jax.eval_shape(lambda y: lax.split(y, [len(y) // 2, len(y) // 2])[0], x)
    _, back = jax.vjp(
        lambda y: collectives.all_gather(y, "data", 0),
        collectives.vary(jax.numpy.zeros(own.shape, own.dtype), ("data",)),
    )
    return back(x)[0]


OPERATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "ours": scatter_ours,
    "psum": lambda x: lax.psum(x, "data"),
    "psum_scatter": lambda x: lax.psum_scatter(x, "data", tiled=True),
}


def measure(rank: int, port: int, out: Path) -> None:
    join_processes(ProcessGroup(f"127.0.0.1:{port}", 2, rank))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rng, found = np.random.default_rng(0), dict[str, Any]()
    for size in MIB:
        # Whole numbers: their sum is the same in any order.
        values = rng.integers(0, 1000, (2, size << 18)).astype(np.float32)
        held = NamedSharding(mesh, P("data"))
        x = jax.make_array_from_process_local_data(held, values[rank])
        total = values.sum(0)
        for name, operation in OPERATIONS.items():
            spec = P() if name == "psum" else P("data")
            program = jax.jit(
                jax.shard_map(operation, mesh=mesh, in_specs=P("data"), out_specs=spec)
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
