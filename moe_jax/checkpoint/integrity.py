"""Checksums that make one flipped bit in a checkpoint visible: of arrays, of files and of whole
directories.

An array's checksum is computed on its devices and depends on its contents alone, so it can be
compared between meshes of different shapes. A directory is sealed by a manifest that lists the size
and BLAKE2b digest of every file in it; the manifest's own digest lies beside it (`b2sum -l 256 -c
manifest.b2` agrees).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

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
    words = _words(array)
    return jnp.stack(_sums(words, _places(words.shape)))


def slot_checksums(array: jax.Array, source_RP: np.ndarray, slots: int) -> np.ndarray:
    """For an array [R, P, ...] what each slot adds to the checksum of the array [R, `slots`, ...]
    that was saved, uint32 [R, P, 2]; `source_RP` says which of its slots each one is.

    So a slot proves itself wherever it is laid, and the sum over the slots that were saved is the
    array's checksum.
    """
    program = _slot_program(_whole(array.sharding))
    return np.asarray(jax.device_get(program(array, *_slot_arguments(source_RP, slots))))


def lower_slot_checksums(array: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    """The program of `slot_checksums` for an array of that shape and sharding, before it is
    compiled.
    """
    places = np.zeros(array.shape[:2])
    program = _slot_program(_whole(array.sharding))
    return program.lower(array, *_slot_arguments(places, array.shape[1]))


def _whole(sharding: Any) -> Any:
    """The sharding of a result that every device has."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _slot_arguments(source_RP: np.ndarray, slots: int) -> tuple[np.ndarray, np.uint32]:
    return np.asarray(source_RP, np.uint32), np.uint32(slots)


@functools.cache
def _slot_program(out: Any) -> Any:
    """The compiled sums of `slot_checksums`, its result whole on every device."""

    def sums(array: jax.Array, source_RP: jax.Array, slots: jax.Array) -> jax.Array:
        words = _words(array)
        inner = math.prod(words.shape[2:])
        row = jnp.arange(words.shape[0], dtype=jnp.uint32)[:, None] * slots + source_RP
        first = (row * jnp.uint32(inner % 2**32)).reshape(row.shape + (1,) * (words.ndim - 2))
        place = first + _places((1, 1, *words.shape[2:]))
        return jnp.stack(_sums(words, place, tuple(range(2, words.ndim))), axis=-1)

    return jax.jit(sums, out_shardings=out)


def _words(array: jax.Array) -> jax.Array:
    """The bits of each element as uint32."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    info = (
        jnp.iinfo(array.dtype)
        if jnp.issubdtype(array.dtype, jnp.integer)
        else jnp.finfo(array.dtype)
    )
    # 64-bit elements become two words in a new last dim.
    return jax.lax.bitcast_convert_type(array, f"uint{min(info.bits, 32)}").astype(jnp.uint32)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """The place of each element in row-major order, modulo 2**32."""
    place = jnp.zeros(shape, jnp.uint32)
    for dim, size in enumerate(shape):
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    return place


def _sums(
    words: jax.Array, place: jax.Array, axes: tuple[int, ...] | None = None
) -> tuple[jax.Array, jax.Array]:
    mixed = _mix(words ^ _mix(place + jnp.uint32(1)))
    second = mixed * (2 * place + 1)
    return jnp.sum(mixed, axes, jnp.uint32), jnp.sum(second, axes, jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit over the word (MurmurHash3's finalizer)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def describe(arrays: dict[str, jax.Array], has_slots: Callable[[str, int], bool]) -> dict[str, Any]:
    """What a manifest says of each array: shape, dtype, checksum and, where a row of it is a slot,
    the part that each slot has in the checksum, a text for each of R.

    One array after the other: on simulated devices, two programs with collectives under way can
    wait for each other forever where the host has fewer cores than there are devices (XLA:CPU, jax
    0.10.1).
    """
    described = {}
    for name, array in arrays.items():
        entry = {"shape": list(array.shape), "dtype": str(array.dtype)}
        if has_slots(name, array.ndim):
            repeats, slots = array.shape[:2]
            sums = slot_checksums(array, np.broadcast_to(np.arange(slots), (repeats, slots)), slots)
            entry["checksum"] = _text(sums.sum((0, 1), dtype=np.uint32))
            entry["slots"] = [_text(row) for row in sums]
        else:
            entry["checksum"] = checksum_text(array)
        described[name] = entry
    return described


def checksum_text(array: jax.Array) -> str:
    """The checksum of an array as sixteen hex digits."""
    return _text(jax.device_get(array_checksum(array)))


def agrees(array: jax.Array, entry: dict[str, Any], source_RP: np.ndarray | None = None) -> bool:
    """Whether an array is the one that an entry of `describe` speaks of; where that has checksums
    of slots, whether each slot is the one of the saved array that `source_RP` names. Empty ones,
    below 0, are not looked at.
    """
    if "slots" not in entry:
        return checksum_text(array) == entry["checksum"]
    assert source_RP is not None
    repeats, slots = entry["shape"][:2]
    saved = np.frombuffer(bytes.fromhex("".join(entry["slots"])), ">u4").reshape(repeats, slots, 2)
    expected = np.take_along_axis(saved, np.maximum(source_RP, 0)[..., None], axis=1)
    same = slot_checksums(array, source_RP, slots) == expected
    return bool(np.all(same | (source_RP < 0)[..., None]))


def _text(sums: np.ndarray) -> str:
    """Eight hex digits for each number."""
    return np.asarray(sums).astype(">u4").tobytes().hex()


def write_durably(path: Path, text: str) -> None:
    """Write a file that survives a power cut once this returns (its directory entry aside)."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def seal_directory(
    directory: Path, content: dict[str, Any], known: dict[str, Any] | None = None
) -> None:
    """Write the manifest of everything in `directory`: `content` plus a "files" entry, and the
    manifest's seal.

    `known` are entries that other processes made of files that they wrote. Flushes every other file
    and all folders to the disk, so that a later rename of the directory is a commit.
    """
    known = known or {}
    rest = digest_files(directory, [path for path in list_files(directory) if path not in known])
    files = dict(sorted((known | rest).items()))
    text = json.dumps(content | {"files": files}, indent=1)
    write_durably(directory / MANIFEST, text)
    write_durably(directory / SEAL, _seal(text.encode()))
    for folder, _, _ in os.walk(directory):
        flush_folder(Path(folder))


def digest_files(directory: Path, paths: list[str]) -> dict[str, Any]:
    """The manifest's entry of each of these files, which have then reached the disk."""
    entries = _each(lambda path: _digest(directory / path, flush=True), paths)
    return dict(zip(paths, entries, strict=True))


def writer_of(path: str) -> int:
    """The process that writes a file of a checkpoint; Orbax numbers what is not the first's."""
    number = re.search(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)", path)
    return int(number[1]) if number else 0


def share(files: dict[str, Any], process: int, processes: int) -> list[str]:
    """Those of the files of a manifest that a process reads to verify them: each file is one
    process's.

    The files that it wrote, where there are as many processes as then: it reads arrays from them
    anyway. Else such that all have about as many bytes.
    """
    writers = {path: writer_of(path) for path in files}
    if len(set(writers.values())) == processes:
        return sorted(path for path, writer in writers.items() if writer == process)
    sizes, mine = [0] * processes, []
    for path in sorted(files, key=lambda path: (-files[path]["bytes"], path)):
        least = sizes.index(min(sizes))
        sizes[least] += files[path]["bytes"]
        if least == process:
            mine.append(path)
    return sorted(mine)


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


def verify_directory(
    directory: Path, manifest: dict[str, Any], process: int = 0, processes: int = 1
) -> None:
    """Read this process's share of the files and compare it with the manifest; raises
    `CorruptCheckpoint` naming the first that differs. A missing or an additional file is damage
    too, which the first process looks for.
    """
    written = manifest["files"]
    if process == 0:
        present = set(list_files(directory)) - {MANIFEST, SEAL}
        for path in sorted(written.keys() - present):
            raise CorruptCheckpoint(f"{directory / path} is missing")
        for path in sorted(present - written.keys()):
            raise CorruptCheckpoint(f"{directory / path} was not written with the checkpoint")
    paths = share(written, process, processes)
    entries = _each(lambda path: _read_digest(directory / path), paths)
    for path, entry in zip(paths, entries, strict=True):
        if entry["bytes"] != written[path]["bytes"]:
            raise CorruptCheckpoint(
                f"{directory / path} has {entry['bytes']} bytes where {written[path]['bytes']} "
                f"were written"
            )
        if entry != written[path]:
            raise CorruptCheckpoint(f"{directory / path} does not hold the bytes that were written")


def list_files(directory: Path) -> list[str]:
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
