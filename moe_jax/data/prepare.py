"""Preparing text: tokenizing it once into a folder, by several processes, which goes on after a
kill; and the cache of what runs prepared for themselves.

    prepare(DataConfig(source="texts", tokenizer="tokenizer.json"), Path("prepared"), workers=8)

What is being prepared is in OUT.part: a shard for each piece of the source, and its description,
which is written last. What has one is not done again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax import __version__
from moe_jax.config.schema import DataConfig
from moe_jax.data.encode import encode_piece
from moe_jax.data.hold_out import Split, hold_out, tokens_to_hold_out
from moe_jax.data.packing import Stream, largest_token, sizes_with_ends
from moe_jax.data.prepared import (
    FORMAT,
    PLAN,
    PREPARED_INDEX,
    Prepared,
    is_prepared,
    map_shards,
    read_index,
    read_split,
    tokenizer_identity,
    write_index,
    write_shard,
    write_split,
)
from moe_jax.data.sources import PIECE_BYTES, SourcePart, TextSource, find_source
from moe_jax.data.tokenizer import Tokenizer, load_tokenizer
from moe_jax.errors import UserError
from moe_jax.runtime.compile_cache import CACHE_VARIABLE, cache_root
from moe_jax.runtime.workers import worker_processes
from moe_jax.utils.files import PART, exclusive, refuse_existing, rename_folder, replace_text
from moe_jax.utils.progress import byte_progress, say

_LOCK = ".lock"


class _Task(NamedTuple):
    """A piece to be tokenized, and where its shard goes."""

    config: DataConfig
    folder: Path
    number: int
    piece: list[SourcePart]


def prepare(
    config: DataConfig, out: Path, workers: int = 1, source: TextSource | None = None
) -> dict[str, Any]:
    """Tokenizes `data.source` into the new folder `out`; returns its index.

    Memory: about 5 bytes per byte of the largest piece for each worker, a file of text being one
    piece; and 3 bytes per document.

    Args:
      config: source, tokenizer, and the fraction whose split is stored.
      out: the folder. What a killed call left in `out`.part is gone on with.
      workers: processes; one is this process, with the threads of the tokenizer.
      source: what `find_source` gave for it.

    Raises:
      UserError: `out` exists, `out`.part was begun with something else, or the text or the
        tokenizer cannot be read.
    """
    refuse_existing(out)
    tokenizer = load_tokenizer(config.tokenizer)
    source = source or find_source(config)
    part = out.with_name(out.name + PART)
    plan = _plan(config, tokenizer, source)
    _refuse_other(part, plan)
    part.mkdir(parents=True, exist_ok=True)
    with exclusive(part / _LOCK, wait=False) as held:
        if not held:
            raise UserError(
                f"{out} is being prepared by another process: wait for it, or name another folder."
            )
        refuse_existing(out)  # which the other may have finished meanwhile
        replace_text(part / PLAN, json.dumps(plan) + "\n")
        if not (part / PREPARED_INDEX).exists():
            _write_shards(config, part, source, workers)
            _write_index(config, part, tokenizer, len(source.pieces))
        (part / _LOCK).unlink()
        rename_folder(part, out)
    return read_index(out)


def _plan(config: DataConfig, tokenizer: Tokenizer, source: TextSource) -> dict[str, Any]:
    """What decides what the shards hold; for JSON."""
    known = tokenizer_identity(tokenizer, config.tokenizer)
    return {
        "format": FORMAT,
        "piece": PIECE_BYTES,
        "source": source.identity,
        "tokenizer": {key: value for key, value in known.items() if key != "name"},
        "text_field": config.text_field,
        "loss_on": config.loss_on,
    }


def _refuse_other(part: Path, plan: dict[str, Any]) -> None:
    """Raises UserError where there is something that cannot be gone on with."""
    if not part.exists():
        return
    path = part / PLAN
    try:
        begun = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        if isinstance(error, NotADirectoryError) or any(
            file.name != _LOCK and not file.name.startswith(PLAN) for file in part.iterdir()
        ):
            raise UserError(
                f"{part} is in the way (it is not what a preparation left): move it, or name "
                f"another folder."
            ) from error
        return
    if begun != json.loads(json.dumps(plan)):
        differing = ", ".join(key for key in plan if begun.get(key) != plan[key])
        raise UserError(
            f"{part} is half prepared from something else (its {differing} differs): delete it, or "
            f"name another folder."
        )


def _described(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.json"


def _write_shards(config: DataConfig, part: Path, source: TextSource, workers: int) -> None:
    tasks = [
        _Task(config, part, number, piece)
        for number, piece in enumerate(source.pieces)
        if not _described(part, number).exists()
    ]
    left = sum(each.size for task in tasks for each in task.piece)
    with (
        byte_progress(f"Preparing {config.source}", source.size) as progress,
        worker_processes(min(workers, max(len(tasks), 1))) as run,
    ):
        progress(source.size - left)
        for done in run(_write_piece, tasks):
            progress(done)


def _write_piece(task: _Task) -> int:
    """Tokenizes a piece and writes its shard; returns the bytes that it read."""
    tokenizer = _tokenizer(task.config.tokenizer)
    shard = encode_piece(task.piece, tokenizer, task.config)
    stated = {
        "tokens": len(shard.tokens),
        "documents": len(shard.keys),
        "total": int(sizes_with_ends(shard).sum()),
        "largest_id": largest_token(shard),
        "conversations": shard.counted is not None,
        "files": write_shard(task.folder, task.number, shard),
    }
    replace_text(_described(task.folder, task.number), json.dumps(stated))
    return sum(part.size for part in task.piece)


@functools.lru_cache(1)
def _tokenizer(spec: str) -> Tokenizer:
    return load_tokenizer(spec)


def _write_index(config: DataConfig, part: Path, tokenizer: Tokenizer, count: int) -> None:
    """Writes the split and the index of all shards, whose descriptions go."""
    described = [_described(part, number) for number in range(count)]
    stated = [json.loads(path.read_bytes()) for path in described]
    shards = [shard for shard in stated if shard["documents"]]
    for shard in stated:
        if not shard["documents"]:
            for name in shard["files"]:
                (part / name).unlink(missing_ok=True)
    if not shards:
        raise no_text(config)
    stream = map_shards(part, shards)
    split = hold_out(stream, config.validation_fraction, 1)
    wanted = tokens_to_hold_out(stream.total, config.validation_fraction, 1)
    index = {
        "format": FORMAT,
        "version": __version__,
        "source": config.source,
        "text_field": config.text_field,
        "loss_on": config.loss_on,
        "tokenizer": tokenizer_identity(tokenizer, config.tokenizer),
        "conversations": any(shard["conversations"] for shard in shards),
        "documents": sum(shard["documents"] for shard in shards),
        "corpus_hash": corpus_hash(stream, tokenizer),
        "split": {"wanted": wanted, **write_split(part, split)},
        "shards": shards,
    }
    write_index(part, index)
    for path in described:
        path.unlink()


def corpus_hash(stream: Stream, tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of the documents, in order, and of the tokenizer."""
    digest = hashlib.sha256()
    for number in range(len(stream.bases) - 1):
        digest.update(np.ascontiguousarray(stream.shard(number).keys).data)
    digest.update(tokenizer.fingerprint.encode())
    return digest.hexdigest()


def no_text(config: DataConfig) -> UserError:
    """The error for a source in which there is nothing."""
    return UserError(
        f"data.source={config.source!r} is empty or blank: give a source with text in it."
    )


def split_for(text: Prepared, fraction: float, seq_len: int) -> Split:
    """The split of a prepared folder by any fraction: the one that is stored with it, else one that
    is kept in the cache, or made at each start where there is none.
    """
    wanted = tokens_to_hold_out(text.stream.total, fraction, seq_len)
    # Long documents aside, the length of a sequence only matters where the fraction is tiny.
    free = wanted > 2 * seq_len + 1
    if free and wanted == text.index["split"]["wanted"]:
        return text.split
    root = cache_root()
    if root is None:
        return hold_out(text.stream, fraction, seq_len)
    name = f"{text.hash[:32]}-{wanted}" + ("" if free else f"-{seq_len}")
    folder = root / "text" / "splits" / name

    def write() -> None:
        part = folder.with_name(folder.name + PART)
        part.mkdir(exist_ok=True)
        stated = write_split(part, hold_out(text.stream, fraction, seq_len))
        replace_text(part / PREPARED_INDEX, json.dumps(stated))
        rename_folder(part, folder)

    make_once(folder, write)
    return read_split(folder, json.loads((folder / PREPARED_INDEX).read_bytes()))


def cached(
    config: DataConfig, tokenizer: Tokenizer, source: TextSource, tell: Callable[[str], None]
) -> Path | None:
    """The folder in the cache with the text of `data.source`, prepared now where it is not there;
    None where nothing is kept.
    """
    root = cache_root()
    if root is None:
        return None
    plan = json.dumps(_plan(config, tokenizer, source), sort_keys=True)
    folder = root / "text" / hashlib.sha256(plan.encode()).hexdigest()[:32]
    if is_prepared(folder):
        tell(f"Reading data.source={config.source}, prepared in {folder}.")
        return folder
    tell(f"Preparing data.source={config.source} once, in {folder}.")
    make_once(folder, lambda: prepare(config, folder, source=source))
    return folder


def make_once(folder: Path, make: Callable[[], object]) -> None:
    """Makes a folder of the cache that is not there; of several processes that want it one does,
    while the others wait. Raises UserError where the cache cannot be written.
    """
    lock = folder.with_name(folder.name + _LOCK)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise UserError(
            f"{folder.parent}, where prepared data is kept, cannot be written ({error.strerror}): "
            f"set {CACHE_VARIABLE} to a folder that can."
        ) from error
    with exclusive(lock, wait=False) as free:
        if free:
            if not folder.exists():
                make()
            return
    say(f"Waiting for another process, which is writing {folder}.")
    with exclusive(lock, wait=True):
        if not folder.exists():  # the other has failed
            make()
