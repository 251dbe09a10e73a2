"""Texts of other libraries that we read: a new version that changes one fails here."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest
import tensorstore

from moe_jax.checkpoint import orbax_io
from moe_jax.runtime.quiet import CLOSED_LOOP


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
