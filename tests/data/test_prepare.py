"""A prepared folder gives what its source gives, goes on after a kill, and says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.config.schema import DataConfig, MixtureSource
from moe_jax.data import corpus as corpus_module
from moe_jax.data import prepare as module
from moe_jax.data import prepared, sources
from moe_jax.data.corpus import Corpus, load_corpus
from moe_jax.data.prepare import prepare
from moe_jax.data.prepared import read_index, verify_prepared, write_array, write_index
from moe_jax.errors import UserError
from moe_jax.runtime.workers import worker_processes
from moe_jax.utils.files import local_path
from tests.support import ROOT
from tests.support.tokenizers import CHATML, CHATML_TOKENS, chat_folder


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 1_000)


def write_source(folder: Path, chats: bool = False) -> Path:
    """Some texts, and conversations, in files of several kinds; one text twice, and one empty."""
    random = np.random.RandomState(0)
    folder.mkdir()
    words = [
        "".join(random.choice(list("abcdefgh \n"), size)) for size in random.randint(1, 90, 120)
    ]
    (folder / "a.txt").write_text("some text\n" * 40)
    lines = [json.dumps({"text": word}) for word in [*words, words[3], " "]]
    said = [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "fox"}]
    lines += [json.dumps({"messages": said[: 2 - i % 2]}) for i in range(9 * chats)]
    (folder / "b.jsonl").write_text("\n".join(lines))
    (folder / "c.md").write_text("end")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "texts")


def assert_same_corpus(one: Corpus, other: Corpus) -> None:
    assert one.hash == other.hash and one.largest_id == other.largest_id
    assert one.sample_prompt() == other.sample_prompt()
    batches = zip(one.train_batches(4), other.train_batches(4), range(60), strict=False)
    held = zip(one.validation_batches(4, 2), other.validation_batches(4, 2), [0, 0], strict=True)
    for a, b, _ in [*batches, *held]:
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("chats", [False, True])
def test_a_prepared_folder_gives_the_batches_of_its_source(tmp_path: Path, chats: bool) -> None:
    chat_folder(tmp_path / "tokenizer", CHATML, CHATML_TOKENS)
    config = DataConfig(
        source=str(write_source(tmp_path / "texts", chats)),
        tokenizer=str(tmp_path / "tokenizer") if chats else "bytes",
        validation_fraction=0.2,
    )
    out = tmp_path / "out"
    index = prepare(config, out)
    assert len(index["shards"]) >= 5 and index["conversations"] == chats
    assert sum(verify_prepared(out)) > 0
    for fraction in (0.2, 0.3, 0.001):  # the one that is stored, others, one window
        given = dataclasses.replace(config, validation_fraction=fraction)
        stored = dataclasses.replace(given, source=str(out))
        one, other = (load_corpus(each, 8, seed=3) for each in (given, stored))
        if fraction > 0.1:
            assert_same_corpus(one, other)
        assert one.validation.size == other.validation.size


@pytest.mark.usefixtures("small_pieces")
def test_large_sources_are_prepared_once_into_the_cache(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(source=str(source), validation_fraction=0.2)
    small = load_corpus(config, 8, seed=3)
    monkeypatch.setattr(corpus_module, "SMALL_BYTES", 0)
    assert_same_corpus(small, load_corpus(config, 8, seed=3))  # MOE_JAX_CACHE is empty in tests
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    assert_same_corpus(small, load_corpus(config, 8, seed=3, tell=said.append))
    assert re.fullmatch(
        rf"Preparing data\.source={source} once, in {tmp_path}/cache/text/\w+\.", said.pop()
    )

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_piece", never)
        assert_same_corpus(small, load_corpus(config, 8, seed=3, tell=said.append))
        assert re.fullmatch(r"Reading data\.source=.*, prepared in .*/cache/text/\w+\.", said[0])
        # Another split is found once and kept.
        other = dataclasses.replace(config, validation_fraction=0.3)
        assert_same_corpus(load_corpus(other, 8, seed=3), load_corpus(other, 8, seed=3))
        assert len(list((tmp_path / "cache" / "text" / "splits").glob("*/prepared.json"))) == 1
    (source / "c.md").write_text("END")
    assert load_corpus(config, 8, seed=3).hash != small.hash


@pytest.mark.usefixtures("small_pieces")
def test_of_several_that_start_at_once_one_prepares(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads have a lock each, as processes do."""
    monkeypatch.setattr(corpus_module, "SMALL_BYTES", 0)
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    encode, encoded, others = module.encode_piece, [], threading.Semaphore(0)

    def encode_piece(*args: Any) -> Any:
        if not encoded:  # until the others wait
            assert others.acquire(timeout=60) and others.acquire(timeout=60)
        encoded.append(str(args[0]))
        return encode(*args)

    monkeypatch.setattr(module, "encode_piece", encode_piece)
    monkeypatch.setattr(module, "say", lambda text: others.release())
    with ThreadPoolExecutor(3) as pool:
        config = DataConfig(source=str(source))
        results = [pool.submit(load_corpus, config, 8, seed=3) for _ in range(3)]
        one, *rest = [result.result(timeout=120) for result in results]
    for other in rest:
        assert_same_corpus(one, other)
    assert len(encoded) == len(set(encoded)) >= 5


def test_a_cache_that_cannot_be_written_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(corpus_module, "SMALL_BYTES", 0)
    with pytest.raises(UserError, match=r"file/text, where .* kept, cannot .*set MOE_JAX_CACHE to"):
        load_corpus(DataConfig(source=str(source)), 8, 0)


@pytest.mark.usefixtures("small_pieces")
def test_a_killed_preparation_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(source=str(source))
    whole = prepare(config, tmp_path / "whole")
    out, part = tmp_path / "out", tmp_path / "out.part"
    encode, encoded = module.encode_piece, []

    def killed_after(count: int) -> Callable[..., Any]:
        def encode_piece(*args: Any) -> Any:
            if len(encoded) == count:
                raise KeyboardInterrupt
            encoded.append(args[0])
            return encode(*args)

        return encode_piece

    for count in (2, 3):
        monkeypatch.setattr(module, "encode_piece", killed_after(count))
        with pytest.raises(KeyboardInterrupt):
            prepare(config, out)
        assert not out.exists() and len(list(part.glob("*.json"))) == count + 1
    with pytest.raises(UserError, match=r"out\.part.* is half prepared: run the same"):
        load_corpus(dataclasses.replace(config, source=str(part)), 8, 0)
    with pytest.raises(UserError, match=r"/out' is half prepared, in .*/out\.part: run the same"):
        load_corpus(dataclasses.replace(config, source=str(out)), 8, 0)
    with pytest.raises(UserError, match=r"half prepared from something else \(its text_field"):
        prepare(dataclasses.replace(config, text_field="body"), out)
    monkeypatch.setattr(module, "encode_piece", killed_after(10**6))
    assert prepare(config, out) == whole
    assert not part.exists() and len(encoded) == len({str(piece) for piece in encoded})
    with pytest.raises(UserError, match=r"out exists already: name another folder"):
        prepare(config, out)
    part.mkdir()
    (part / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        prepare(config, out)
    shutil.rmtree(out)
    with pytest.raises(UserError, match=r"out\.part is in the way"):
        prepare(config, out)


def test_what_is_wrong_with_a_prepared_folder(source: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    prepare(DataConfig(source=str(source)), good)
    load_corpus(DataConfig(source=str(good)), 8, 0)
    file = chat_folder(tmp_path / "t", CHATML, CHATML_TOKENS)
    with pytest.raises(
        UserError, match=r"good' was prepared with another tokenizer \(bytes\) than data\.tok"
    ):
        load_corpus(DataConfig(source=str(good), tokenizer=str(file)), 8, 0)
    mixture = (MixtureSource(source=str(source)), MixtureSource(source=str(good)))
    with pytest.raises(UserError, match=r"^data\.mixture\[1\]\.source=.* another tokenizer"):
        load_corpus(DataConfig(mixture=mixture, tokenizer=str(file)), 8, 0)

    def damaged(name: str, change: Callable[[bytes], bytes | None]) -> Path:
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        content = change((bad / name).read_bytes())
        if content is None:
            (bad / name).unlink()
        else:
            (bad / name).write_bytes(content)
        return bad

    def flipped(content: bytes) -> bytes:
        return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]

    for name, change, words in (
        ("00000.tokens.npy", lambda content: content[:-1], r"has [\d,]+ bytes instead of [\d,]+:"),
        ("split.train.npy", lambda content: None, "is missing: copy it again, or prepare it again"),
        ("prepared.json", lambda content: content[: len(content) // 2], "is damaged: prepare it"),
        ("prepared.json", lambda c: c.replace(b'"tokens": ', b'"tokens": 1'), "its hash is an"),
        ("prepared.json", lambda content: None, "is half prepared"),
    ):
        with pytest.raises(UserError, match=words):
            load_corpus(DataConfig(source=str(damaged(name, change))), 8, 0)
    for name in ("00000.tokens.npy", "00000.keys.npy", "split.validation.npy"):
        with pytest.raises(UserError, match=rf"{name} is damaged \(its hash is another\)"):
            list(verify_prepared(damaged(name, flipped)))


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as error:
        write_array(tmp_path / "full", np.zeros(1 << 20))
    assert error.value.filename == str(tmp_path / "full")


def test_a_text_of_10_gigabytes_is_opened_at_once(tmp_path: Path) -> None:
    """Files with holes: 5e9 tokens in 10 million documents of 500, all of them tokens 0."""
    config = DataConfig(source=str(tmp_path / "out"))
    tokenizer = corpus_module.load_tokenizer("bytes")
    (tmp_path / "out").mkdir()
    shards, documents, length = 100, 100_000, 500

    def hole(name: str, shape: tuple[int, ...], kind: type) -> dict[str, Any]:
        values = np.lib.format.open_memmap(tmp_path / "out" / name, "w+", kind, shape)
        del values
        return {"bytes": (tmp_path / "out" / name).stat().st_size, "sha256": ""}

    stated = [
        {
            "tokens": documents * length,
            "documents": documents,
            "total": documents * length,
            "largest_id": 256,
            "files": {
                f"{n:05}.tokens.npy": hole(f"{n:05}.tokens.npy", (documents * length,), np.uint16),
                f"{n:05}.keys.npy": hole(f"{n:05}.keys.npy", (documents, 32), np.uint8),
                f"{n:05}.starts.npy": write_array(
                    tmp_path / "out" / f"{n:05}.starts.npy", np.arange(documents + 1) * length
                ),
            },
        }
        for n in range(shards)
    ]
    runs = np.arange(500_000) * 10_000  # every twentieth document is held out
    places = {"validation": runs, "train": runs + length}
    sizes = {"validation": length, "train": 19 * length}
    split = {
        name: {
            "size": len(runs) * sizes[name],
            "counts": True,
            "files": {
                f"split.{name}.npy": write_array(
                    tmp_path / "out" / f"split.{name}.npy",
                    np.stack([np.arange(len(runs)) * sizes[name], places[name]]),
                )
            },
        }
        for name in ("train", "validation")
    }
    index = {
        "format": 1,
        "loss_on": "assistant",
        "tokenizer": prepared.tokenizer_identity(tokenizer, "bytes"),
        "conversations": False,
        "corpus_hash": "0" * 64,
        "split": {"wanted": 250_000_000, **split},
        "shards": stated,
    }
    write_index(tmp_path / "out", index)
    began = time.perf_counter()
    corpus = load_corpus(config, 256, 0)
    batches = corpus.train_batches(16)
    for _ in range(3):
        batch = next(batches)
    held = corpus.validation_batches(16, 4)
    seconds = time.perf_counter() - began
    assert seconds < 10
    assert len(corpus.train) == -(-(4_750_000_000 - 1) // 256) and len(held) == 4
    assert batch["segments"].max() == 2 and (batch["positions"][:, -1] < 500).all()


@pytest.mark.usefixtures("small_pieces")
def test_workers_write_the_same_and_end_with_their_parent(source: Path, tmp_path: Path) -> None:
    one = prepare(DataConfig(source=str(source)), tmp_path / "one")
    command = [sys.executable, "-m", "tests.support.preparing_process", str(source), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = json.loads(process.stdout.readline())
    assert read_index(tmp_path / "two") == one
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.time() + 60
    while any(map(_runs, workers)) and time.time() < until:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(map(_runs, workers))


def _runs(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    # A zombie of a killed process waits for whoever adopted it.
    state = Path(f"/proc/{number}/stat")
    return not (state.exists() and ") Z" in state.read_text())


def test_an_error_in_a_worker_is_raised() -> None:
    with pytest.raises(UserError, match="gs://bucket is a URL"), worker_processes(2) as run:
        list(run(local_path, ["texts", "gs://bucket"]))
