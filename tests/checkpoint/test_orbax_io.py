"""What is read of a stored array; and texts of other libraries that we read: a new version that
changes one fails here.
"""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.checkpoint import orbax_io
from moe_jax.runtime.quiet import CLOSED_LOOP
from tests.support.saved_state import mesh


def test_tensorstore_quotes_the_systems_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = {"driver": "file", "path": str(tmp_path / "file" / "array")}
    spec = {
        "driver": "zarr",
        "kvstore": place,
        "metadata": {"dtype": "<f4", "shape": [4], "chunks": [4]},
    }
    with pytest.raises(ValueError) as caught:
        tensorstore.open(spec, create=True).result()
    assert f"os_error_code='{errno.ENOTDIR}'" in str(caught.value)
    explained = orbax_io.explain(caught.value, 3, tmp_path)
    assert str(explained).startswith(f"step 3 cannot be saved in {tmp_path}")


def test_asyncio_says_that_a_loop_is_closed() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as caught:
        loop.call_soon_threadsafe(print)
    assert str(caught.value) == CLOSED_LOOP


class CountingStore:
    """A stored array that counts the bytes that are read and those that wait to be used."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.read_bytes, self.waiting, self.most = array, 0, 0, 0

    def __getitem__(self, index: Any) -> Any:
        store, part, used = self, self.array[index], []

        class Reading:
            def read(self) -> Any:
                store.read_bytes += part.nbytes
                store.waiting += part.nbytes
                store.most = max(store.most, store.waiting)
                return self

            def result(self) -> np.ndarray:
                if not used:
                    used.append(True)
                    store.waiting -= part.nbytes
                return part

        return Reading()


def test_a_process_holds_its_share_and_an_experts_arrays() -> None:
    """Beside what its devices will hold, four slots at a time: an expert has two matrices, each
    with its two moments. Counted, for the placement turned around.
    """
    stored = np.random.default_rng(0).integers(0, 2**32, (2, 8, 16, 32), np.uint32)
    store, rows = CountingStore(stored), np.tile(np.arange(8)[::-1], (2, 1))
    sharding = NamedSharding(mesh(2, 4), PartitionSpec(None, "expert", "data"))
    leaf = jax.ShapeDtypeStruct(stored.shape, np.uint32, sharding=sharding)
    found = orbax_io._read_rows(store, leaf, rows)
    np.testing.assert_array_equal(found, stored[:, ::-1])
    assert store.read_bytes == stored.nbytes  # each slot once, though two devices share it
    assert store.most <= 4 * stored[0, 0].nbytes
