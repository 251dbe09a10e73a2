"""Packing worked by hand, and batches that resume and shard exactly."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config.schema import DataConfig
from moe_jax.data.corpus import Corpus, load_corpus
from moe_jax.data.packing import Packed, counted_tokens, token_dtype
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
from tests.support import ROOT
from tests.support.texts import counted_of, documents_of, packed, tokens_of
from tests.support.tokenizers import CHATML, CHATML_TOKENS, chat_folder

BYTES = load_tokenizer("bytes")
EOS = BYTES.eos_id
SHAKESPEARE = ROOT.parent / "shared" / "data" / "text" / "tinyshakespeare.txt"


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def concatenate(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Sixty documents of 20 to 79 random letters, in sequences of 16."""
    file = tmp_path_factory.mktemp("corpus") / "lines.jsonl"
    letters = np.random.RandomState(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (60, 80))
    file.write_text(
        "".join(
            json.dumps({"text": "".join(row[: 20 + i])}) + "\n" for i, row in enumerate(letters)
        )
    )
    return load_corpus(DataConfig(source=str(file), validation_fraction=0.2), seq_len=16, seed=7)


def test_packing_by_hand() -> None:
    # Stream: a b | EOS, c | EOS, d e f | EOS -> windows of 4 inputs start at 0, 4 and end in
    # padding.
    text = packed([np.array([1, 2]), np.array([3]), np.array([4, 5, 6])], 4, BYTES)
    assert tokens_of(text).dtype == np.uint16
    assert tokens_of(text).tolist() == [1, 2, EOS, 3, EOS, 4, 5, 6, EOS]
    assert text.stream.shard(0).starts.tolist() == [0, 3, 5, 9]
    assert len(text) == 2
    batch = text.batch(np.array([0, 1]))
    assert batch["tokens"].tolist() == [[1, 2, EOS, 3], [EOS, 4, 5, 6]]
    assert batch["targets"].tolist() == [[2, EOS, 3, EOS], [4, 5, 6, EOS]]
    assert batch["segments"].tolist() == [[1, 1, 1, 2], [1, 2, 2, 2]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0], [0, 0, 1, 2]]
    assert batch["mask"].tolist() == [[1, 1, 0, 1], [0, 1, 1, 1]]
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": np.int32,
        "targets": np.int32,
        "positions": np.int32,
        "segments": np.int32,
        "mask": np.float32,
    }


def test_padding_by_hand() -> None:
    text = packed(
        [np.array([1, 2, 3]), np.array([4, 5])], 5, BYTES
    )  # 1 2 3 EOS 4 | 5 EOS, then three of padding
    batch = text.batch(np.array([1]))
    assert batch["tokens"].tolist() == [[5, EOS, EOS, EOS, EOS]]
    assert batch["segments"].tolist() == [[1, 1, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 0, 0, 0]]
    assert batch["mask"].tolist() == [[1, 0, 0, 0, 0]]


def test_what_does_not_count_by_hand() -> None:
    # a b* | EOS does not count as its document's last token does not; c | EOS; d* e | EOS*.
    chat = counted_tokens(np.array([1, 2, 3]), np.array([False, True, False]))
    more = counted_tokens(np.array([5, 6]), np.array([False, True]))
    text = packed([chat, np.array([4]), more], 9, BYTES)
    assert tokens_of(text).tolist() == [1, 2, 3, EOS, 4, EOS, 5, 6, EOS]
    assert counted_of(text).astype(int).tolist() == [0, 1, 0, 0, 1, 1, 0, 1, 1]
    batch = text.batch(np.array([0]))
    assert batch["targets"][0].tolist() == [2, 3, EOS, 4, EOS, 5, 6, EOS, EOS]
    assert batch["mask"][0].tolist() == [1, 0, 0, 0, 1, 0, 1, 1, 0]
    assert packed([np.array([1])], 4, BYTES).stream.shard(0).counted is None


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of ChatML, and thirty short conversations beside it."""
    folder = tmp_path_factory.mktemp("talks")
    chat_folder(folder / "tokenizer", CHATML, CHATML_TOKENS)
    rows = [
        [{"role": "user", "content": f"the dog {i}"}, {"role": "assistant", "content": f"fox {i}"}]
        for i in range(30)
    ]
    lines = (json.dumps({"messages": row}) + "\n" for row in rows)
    (folder / "talks.jsonl").write_text("".join(lines))
    return folder


def chat_corpus(talks: Path, **changes: str) -> Corpus:
    settings = {"source": str(talks / "talks.jsonl"), "tokenizer": str(talks / "tokenizer")}
    return load_corpus(DataConfig(**settings | changes), seq_len=16, seed=0)  # type: ignore[arg-type]


def test_of_conversations_the_assistants_turns_count(talks: Path) -> None:
    corpus = chat_corpus(talks)
    tokenizer, (part,) = corpus.tokenizer, corpus.train.parts
    assert tokenizer.chat is not None
    tokens, counted = tokens_of(part), counted_of(part)
    end = tokenizer.chat.tokens["<|im_end|>"]
    text = tokenizer.decode(tokens[counted].tolist())
    assert text.startswith("fox ") and "the dog" not in text and "user" not in text
    assert counted.sum() < len(tokens) / 2
    # One end of a turn per conversation counts, the assistant's.
    assert (tokens[counted] == end).sum() == len(documents_of(part))
    (everything,) = chat_corpus(talks, loss_on="all").train.parts
    assert counted_of(everything).all()
    np.testing.assert_array_equal(tokens_of(everything), tokens)


def test_a_sample_begins_as_the_text_does(talks: Path, corpus: Corpus) -> None:
    prompt = chat_corpus(talks).sample_prompt()
    tokenizer = load_tokenizer(str(talks / "tokenizer"))
    assert re.fullmatch(r"user\nthe dog \d+\nassistant\n", prompt.text)
    assert tokenizer.chat is not None
    assert prompt.tokens == tokenizer.chat.prompt([{"role": "user", "content": prompt.text[5:-11]}])
    plain = corpus.sample_prompt()
    first = documents_of(corpus.validation.parts[0])[0][:-1].tolist()
    assert plain.tokens == first[:24] and len(plain.text) == len(plain.tokens)


def test_conversations_that_cannot_be_trained_on(talks: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"line 1 of .*talks\.jsonl is a conversation and data\.tokenizer='bytes' has no chat",
    ):
        chat_corpus(talks, tokenizer="bytes")
    questions = [{"role": "user", "content": "the dog " * 20}]
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": questions}) + "\n") * 9)
    with pytest.raises(UserError, match=r"the assistant says too little .* data\.loss_on=all"):
        chat_corpus(talks, source=str(tmp_path / "a.jsonl"))
    refusing = chat_folder(tmp_path / "refusing", "{{ raise_exception('no') }}", [])
    with pytest.raises(
        UserError, match=r"^line 1 of .*: data\.tokenizer=.* refuses these messages"
    ):
        chat_corpus(talks, tokenizer=str(refusing))


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    seq_len=st.integers(2, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_windows_reproduce_the_stream(lengths: list[int], seq_len: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    documents = [random.integers(0, 256, length) for length in lengths]
    text = packed(documents, seq_len, BYTES)
    stream = [int(token) for document in documents if len(document) for token in (*document, EOS)]
    if not stream:
        assert len(text) == 0
        return
    assert tokens_of(text).tolist() == stream
    batch = text.batch(np.arange(len(text)))
    real = batch["segments"] > 0
    # Every token but the last (which has no target) is an input once; a last one may stand beside
    # the padding.
    assert batch["tokens"][real].tolist() in (stream, stream[:-1])
    # Every token counts as a target exactly once, but for the first of each document.
    assert sorted(batch["targets"][batch["mask"] > 0].tolist()) == sorted(
        int(t) for d in documents if len(d) for t in (*d[1:], EOS)
    )
    # Within a row the segments count up by one, positions restart with them, and a target of
    # another segment is masked.
    for row in range(len(text)):
        segments, positions = batch["segments"][row], batch["positions"][row]
        for i, (a, b) in enumerate(pairwise(segments.tolist())):
            assert b in (a, a + 1, 0)
            if b == 0:
                continue
            assert positions[i + 1] == (positions[i] + 1 if a == b else 0)
            assert batch["mask"][row, i] == float(a == b)


def test_big_vocabularies_take_four_bytes() -> None:
    large = dataclasses.replace(BYTES, num_ids=100_000, eos_id=99_999)
    tokens = tokens_of(packed([np.array([70_000])], 2, large))
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [70_000, 99_999]
    # Two bytes hold 65,536 ids and no more.
    assert token_dtype(dataclasses.replace(BYTES, num_ids=1 << 16)) == np.uint16
    assert token_dtype(dataclasses.replace(BYTES, num_ids=(1 << 16) + 1)) == np.uint32


def test_validation_documents_are_not_trained_on(corpus: Corpus) -> None:
    def documents(text: Packed) -> set[bytes]:
        return {part.tobytes() for part in documents_of(text)}

    train, validation = documents(corpus.train.parts[0]), documents(corpus.validation.parts[0])
    assert not train & validation
    assert len(train) + len(validation) == 60
    share = corpus.validation.size / (corpus.train.size + corpus.validation.size)
    assert 0.15 < share <= 0.2


def test_every_epoch_holds_every_window_in_another_order(corpus: Corpus) -> None:
    packed = corpus.train
    windows = {packed.batch(np.array([w]))["tokens"].tobytes(): w for w in range(len(packed))}
    assert len(windows) == len(packed)
    batches = corpus.train_batches(1)
    epochs = [
        [windows[next(batches)["tokens"].tobytes()] for _ in range(len(packed))] for _ in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(packed)))
    assert epochs[0] != epochs[1]


def test_the_seed_alone_sets_the_order(corpus: Corpus) -> None:
    assert_same(next(corpus.train_batches(4)), next(corpus.train_batches(4)))
    other = dataclasses.replace(corpus, seed=8)
    assert (next(corpus.train_batches(4))["tokens"] != next(other.train_batches(4))["tokens"]).any()


@pytest.mark.parametrize("taken", [0, 1, 5, 50])  # 50 batches of 4 go past the first epoch
def test_resume_is_exact(corpus: Corpus, taken: int) -> None:
    assert len(corpus.train) < 50 * 4
    batches = corpus.train_batches(4)
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    resumed = corpus.train_batches(4)
    next(resumed)
    resumed.set_state(state)
    for _ in range(3):
        assert_same(next(resumed), next(batches))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(corpus: Corpus, processes: int) -> None:
    whole = corpus.train_batches(8)
    parts = [corpus.train_batches(8, p, processes) for p in range(processes)]
    for _ in range(12):
        assert_same(concatenate([next(part) for part in parts]), next(whole))
    assert all(part.get_state() == whole.get_state() for part in parts)
    validation = corpus.validation_batches(4, 2)
    shares = [corpus.validation_batches(4, 2, p, processes) for p in range(processes)]
    for i, batch in enumerate(validation):
        assert_same(concatenate([share[i] for share in shares]), batch)


def test_an_epoch_is_whole_across_restarts_with_other_numbers_of_processes(corpus: Corpus) -> None:
    part = corpus.train.parts[0]
    windows = {part.batch(np.array([w]))["tokens"].tobytes(): w for w in range(len(part))}
    seen: list[int] = []
    state = corpus.train_batches(8).get_state()
    for count in (1, 2, 4, 8, 2, 1) * (2 * len(part) // 48 + 1):
        processes = [corpus.train_batches(8, p, count) for p in range(count)]
        for process in processes:
            process.set_state(state)
        batch = concatenate([next(process) for process in processes])
        seen += [windows[row.tobytes()] for row in batch["tokens"]]
        state = json.loads(json.dumps(processes[-1].get_state()))
    for epoch in range(2):
        own = seen[epoch * len(part) : (epoch + 1) * len(part)]
        assert sorted(own) == list(range(len(part)))


def test_validation_is_the_same_every_time(corpus: Corpus) -> None:
    first, again = (
        corpus.validation_batches(4, 3),
        dataclasses.replace(corpus, seed=99).validation_batches(4, 3),
    )
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)
    # A longer validation begins with the shorter one.
    assert_same(corpus.validation_batches(4, 1)[0], first[0])


def test_hash_follows_content_and_tokenizer(tmp_path: Path) -> None:
    def corpus_hash(text: str, **changes: float) -> str:
        (tmp_path / "a.txt").write_text(text)
        return load_corpus(DataConfig(source=str(tmp_path), **changes), seq_len=4, seed=0).hash  # type: ignore[arg-type]

    assert corpus_hash("x" * 100) == corpus_hash("x" * 100, validation_fraction=0.3)
    assert corpus_hash("x" * 100) != corpus_hash("x" * 99 + "y")
    assert len(corpus_hash("x" * 100)) == 64


def test_builtin_corpus() -> None:
    corpus = load_corpus(DataConfig(), seq_len=256, seed=0)
    tokens = corpus.train.size + corpus.validation.size
    assert 2_000_000 < tokens < 10_000_000
    assert 0.04 < corpus.validation.size / tokens <= 0.05
    text = corpus.tokenizer.decode(tokens_of(corpus.train.parts[0]).tolist())
    assert "def " in text and "import " in text
    assert corpus.hash == load_corpus(DataConfig(), seq_len=64, seed=1).hash


def test_tinyshakespeare() -> None:
    if not SHAKESPEARE.exists():
        pytest.skip(f"{SHAKESPEARE} is not here")
    corpus = load_corpus(DataConfig(source=str(SHAKESPEARE)), seq_len=128, seed=0)
    text = SHAKESPEARE.read_text()
    parts = (*corpus.train.parts, *corpus.validation.parts)
    assert "".join(corpus.tokenizer.decode(tokens_of(part).tolist()) for part in parts) == text
    assert abs(corpus.validation.size / len(text) - 0.05) < 0.001


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(
        UserError, match=r"data\.source=.*a\.txt' holds \d tokens, too few .*train\.seq_len=16"
    ):
        load_corpus(DataConfig(source=str(tmp_path / "a.txt")), seq_len=16, seed=0)


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match=r"data\.source=.*a\.txt.*empty"):
        load_corpus(DataConfig(source=str(tmp_path / "a.txt")), seq_len=16, seed=0)


def test_too_few_windows(corpus: Corpus) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch=1000"):
        corpus.train_batches(1000)
    with pytest.raises(UserError, match=r"data\.validation_fraction .* 400\)"):
        corpus.validation_batches(4, 100)


def test_processes_must_divide_the_batch(corpus: Corpus) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch=4 .* 3 processes"):
        corpus.train_batches(4, 0, 3)
    with pytest.raises(UserError, match=r"train\.global_batch=4 .* 3 processes"):
        corpus.validation_batches(4, 1, 0, 3)
