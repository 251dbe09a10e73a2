"""Checksums: the same on every mesh, different for every change."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.checkpoint.integrity import (
    agrees,
    array_checksum,
    checksum_text,
    describe,
    read_manifest,
    seal_directory,
    share,
    slot_checksums,
    verify_directory,
)


def checksum_of(array: jax.Array) -> str:
    return checksum_text(array)


def reference(words: np.ndarray) -> str:
    """The definition once more, one element at a time in Python's unbounded integers."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    first = second = 0
    for place, word in enumerate(words.reshape(-1).tolist()):
        mixed = mix(word ^ mix(place + 1))
        first, second = first + mixed, second + mixed * (2 * place + 1)
    return f"{first % 2**32:08x}{second % 2**32:08x}"


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize(
    ("dtype", "word"),
    [
        ("float32", np.uint32),
        ("bfloat16", np.uint16),
        ("int8", np.uint8),
        ("bool", np.uint8),
        ("float8_e4m3fn", np.uint8),
    ],
)
def test_equals_the_definition(shape: tuple[int, ...], dtype: str, word: type) -> None:
    values = (
        np.random.default_rng(0)
        .integers(0, 2 if dtype == "bool" else 100, shape)
        .astype(jnp.dtype(dtype))
    )
    assert checksum_of(jnp.asarray(values)) == reference(values.reshape(-1).view(word))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_is_the_same_on_every_mesh(kind: AxisType) -> None:
    values = np.random.default_rng(0).standard_normal((16, 8, 3), np.float32)
    found = set()
    for shape in ((1, 1), (8, 1), (2, 4), (1, 2)):
        mesh = jax.make_mesh(
            shape,
            ("data", "expert"),
            axis_types=(kind,) * 2,
            devices=jax.devices()[: shape[0] * shape[1]],
        )
        for spec in (
            PartitionSpec(),
            PartitionSpec("data", "expert"),
            PartitionSpec(("expert", "data")),
        ):
            found.add(checksum_of(jax.device_put(values, NamedSharding(mesh, spec))))
    assert found == {reference(values.view(np.uint32))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_checksums_of_slots_sum_to_the_arrays(kind: AxisType, dtype: str) -> None:
    """And each goes with its slot to another place, on another mesh."""
    values = np.random.default_rng(0).integers(0, 100, (3, 8, 4, 6)).astype(jnp.dtype(dtype))
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(kind,) * 2)
    saved = jax.device_put(values, NamedSharding(mesh, PartitionSpec(None, "expert", "data")))
    rows = np.tile(np.arange(8), (3, 1))
    total = slot_checksums(saved, rows, 8).sum((0, 1), dtype=np.uint32)
    assert total.tolist() == np.asarray(array_checksum(saved)).tolist()
    entry = describe({"it": saved}, lambda name, ndim: True)["it"]
    assert entry["checksum"] == checksum_of(saved)
    changed = values.copy()
    changed[2, 7, 3, 5] += 1
    assert agrees(saved, entry, rows)
    assert not agrees(jax.device_put(changed, saved.sharding), entry, rows)
    source = np.array([[7, -1], [1, 1], [0, 5]])
    moved = np.take_along_axis(values, source[..., None, None], axis=1)
    moved = jax.device_put(moved, NamedSharding(mesh, PartitionSpec(None, "data", "expert")))
    assert agrees(moved, entry, source)
    assert not agrees(moved, entry, np.array([[7, -1], [1, 2], [0, 5]]))


def test_each_file_is_one_processs_to_verify() -> None:
    sizes = {"meta.json": 1, "state/d/a": 900, "state/d/b": 500, "state/d/c": 500, "state/x": 0}
    files = {name: {"bytes": size} for name, size in sizes.items()}
    shares = [share(files, process, 3) for process in range(3)]
    assert sorted(name for names in shares for name in names) == sorted(files)
    assert max(sum(sizes[name] for name in names) for names in shares) == 900
    files["state/ocdbt.process_1/d/e"] = {"bytes": 9000}
    files["state/array_metadatas/process_1"] = {"bytes": 1}
    assert share(files, 1, 2) == ["state/array_metadatas/process_1", "state/ocdbt.process_1/d/e"]
    assert share(files, 0, 1) == sorted(files)


@given(place=st.integers(0, 63), bit=st.integers(0, 31), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_every_flipped_bit_and_every_swap_shows(place: int, bit: int, seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 2**32, 64, np.uint32)
    flipped, swapped = words.copy(), np.roll(words, 1)
    flipped[place] ^= np.uint32(1 << bit)
    sums = {checksum_of(jnp.asarray(each)) for each in (words, flipped, swapped)}
    assert len(sums) == 3


def test_a_sealed_directory_has_reached_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and every folder, so that a rename of the directory commits all of it."""
    inner = tmp_path / "sealed" / "a" / "b"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent, tmp_path / "sealed"):
        (folder / "data").write_text("x")
    flushed = set()
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.add(os.fstat(handle).st_ino))
    seal_directory(tmp_path / "sealed", {})
    everything = [tmp_path / "sealed", *(tmp_path / "sealed").rglob("*")]
    assert len(everything) == 8  # with the manifest and its seal
    assert {path.stat().st_ino for path in everything} == flushed

    def fail(handle: int) -> None:
        raise OSError("reading writes nothing")

    monkeypatch.setattr(os, "fsync", fail)
    verify_directory(tmp_path / "sealed", read_manifest(tmp_path / "sealed"))
