"""Checksums that make one flipped bit in a checkpoint visible: of arrays, of files and of whole
directories.

An array's checksum is computed on its devices and depends on its contents alone, so it can be
compared between meshes of different shapes. A directory is sealed by a manifest that lists the size
and BLAKE2b digest of every file in it; the manifest's own digest lies beside it (`b2sum -l 256 -c
manifest.b2` agrees).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.errors import CorruptCheckpoint, UserError
from moe_jax.utils.files import is_left_by_system

MANIFEST = "manifest.json"
SEAL = "manifest.b2"


@jax.jit
def array_checksum(array: jax.Array) -> jax.Array:
    """Two uint32 sums over the bits of all elements, each mixed with its place.

    Works on any shape, sharding and process count (sums modulo 2**32 do not depend on their order,
    and the result is replicated). A change in a single element is always seen, any other with odds
    of about 2**-64.
    """
    if array.dtype == jnp.bool_:
        words = array.astype(jnp.uint32)
    else:
        info = (
            jnp.iinfo(array.dtype)
            if jnp.issubdtype(array.dtype, jnp.integer)
            else jnp.finfo(array.dtype)
        )
        # 64-bit elements become two words in a new last dim.
        words = jax.lax.bitcast_convert_type(array, f"uint{min(info.bits, 32)}").astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(
            jnp.uint32, words.shape, dim
        )
    mixed = _mix(words ^ _mix(place + jnp.uint32(1)))
    sums = jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed * (2 * place + 1), dtype=jnp.uint32)
    return jnp.stack(sums)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit over the word (MurmurHash3's finalizer)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def checksum_texts(arrays: dict[str, jax.Array]) -> dict[str, str]:
    """The checksum of each array as sixteen hex digits.

    One array after the other: on simulated devices, two programs with collectives under way can
    wait for each other forever where the host has fewer cores than there are devices (XLA:CPU, jax
    0.10.1).
    """
    sums = {path: jax.device_get(array_checksum(array)) for path, array in arrays.items()}
    return {path: f"{int(high):08x}{int(low):08x}" for path, (high, low) in sums.items()}


def write_durably(path: Path, text: str) -> None:
    """Write a file that survives a power cut once this returns (its directory entry aside)."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def seal_directory(directory: Path, content: dict[str, Any]) -> None:
    """Write the manifest of everything in `directory`: `content` plus a "files" entry, and the
    manifest's seal.

    Flushes every file and folder to the disk, so that a later rename of the directory is a commit.
    """
    paths = _files(directory)
    files = dict(
        zip(paths, _each(lambda path: _digest(directory / path, flush=True), paths), strict=True)
    )
    text = json.dumps(content | {"files": files}, indent=1)
    write_durably(directory / MANIFEST, text)
    write_durably(directory / SEAL, _seal(text.encode()))
    for folder, _, _ in os.walk(directory):
        flush_folder(Path(folder))


def flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the file system has a way to."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # of network folders, some flush files alone
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, checked against its seal. Raises `CorruptCheckpoint` naming the file that is
    damaged or missing.
    """
    text, seal = (_read(directory / name) for name in (MANIFEST, SEAL))
    if seal != _seal(text).encode():
        raise CorruptCheckpoint(f"{directory / MANIFEST} and its digest in {SEAL} do not agree")
    return json.loads(text)


def read_sealed(directory: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """The bytes of one file of the directory, checked against the manifest."""
    data = _read(directory / name)
    if manifest["files"].get(name) != _entry(len(data), hashlib.blake2b(data, digest_size=32)):
        raise CorruptCheckpoint(f"{directory / name} does not hold the bytes that were written")
    return data


def verify_directory(directory: Path, manifest: dict[str, Any]) -> None:
    """Read every file and compare it with the manifest; raises `CorruptCheckpoint` naming the first
    that differs. A missing or an additional file is damage too.
    """
    written = manifest["files"]
    present = set(_files(directory)) - {MANIFEST, SEAL}
    for path in sorted(written.keys() - present):
        raise CorruptCheckpoint(f"{directory / path} is missing")
    for path in sorted(present - written.keys()):
        raise CorruptCheckpoint(f"{directory / path} was not written with the checkpoint")
    paths = sorted(present)
    entries = _each(lambda path: _read_digest(directory / path), paths)
    for path, entry in zip(paths, entries, strict=True):
        if entry["bytes"] != written[path]["bytes"]:
            raise CorruptCheckpoint(
                f"{directory / path} has {entry['bytes']} bytes where {written[path]['bytes']} "
                f"were written"
            )
        if entry != written[path]:
            raise CorruptCheckpoint(f"{directory / path} does not hold the bytes that were written")


def _files(directory: Path) -> list[str]:
    """Paths of all files below a directory, relative and with forward slashes, sorted; those that
    a desktop leaves there belong to nobody.
    """
    return sorted(
        (Path(folder) / name).relative_to(directory).as_posix()
        for folder, _, names in os.walk(directory)
        for name in names
        if not is_left_by_system(Path(name))
    )


def _each(function: Callable[[str], dict[str, Any]], paths: list[str]) -> list[dict[str, Any]]:
    """`function` of every path; on threads, because hashing and reading let go of the
    interpreter.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, paths))


def _digest(path: Path, flush: bool = False) -> dict[str, Any]:
    """Size and digest of a file; with `flush`, after it has reached the disk."""
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
        return _entry(file.tell(), digest)


def _read_digest(path: Path) -> dict[str, Any]:
    """`_digest` for a reader."""
    with _reading(path):
        return _digest(path)


def _entry(size: int, digest: Any) -> dict[str, Any]:
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _seal(manifest: bytes) -> str:
    """The line that b2sum prints for the manifest."""
    return f"{hashlib.blake2b(manifest, digest_size=32).hexdigest()}  {MANIFEST}\n"


def _read(path: Path) -> bytes:
    with _reading(path):
        return path.read_bytes()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say in words why a file cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{path} is missing") from error
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): check the disk and the file's permissions."
        ) from error
