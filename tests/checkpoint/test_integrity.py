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
    checksum_texts,
    read_manifest,
    seal_directory,
    verify_directory,
)


def checksum_of(array: jax.Array) -> str:
    return checksum_texts({"it": array})["it"]


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
