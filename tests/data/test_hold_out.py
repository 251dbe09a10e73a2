"""The split of stored text is that of all documents at once, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import hold_out as module
from moe_jax.data.hold_out import Split, hold_out
from moe_jax.data.packing import Packed, counted_tokens, pack_documents, stream_in_memory
from moe_jax.data.tokenizer import load_tokenizer
from tests.support.texts import tokens_of
from tests.support.whole_text import held_out, packed_whole

BYTES = load_tokenizer("bytes")


def split_in_shards(
    documents: Sequence[np.ndarray], keys: Sequence[bytes], fraction: float, seq_len: int, size: int
) -> tuple[Split, list[Packed]]:
    """The split of documents stored `size` to a shard, and its parts."""
    shards = [
        pack_documents(documents[i : i + size], keys[i : i + size], BYTES)
        for i in range(0, len(documents), size)
    ]
    stream = stream_in_memory(shards)
    split = hold_out(stream, fraction, seq_len)
    return split, [Packed(stream, part, seq_len, BYTES.eos_id) for part in split]


@given(
    lengths=st.lists(st.integers(0, 30), min_size=5, max_size=5),
    order=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    fraction=st.floats(0.01, 0.5),
    seq_len=st.integers(2, 10),
    size=st.integers(1, 7),
    at_once=st.sampled_from([1, 3, 1 << 20]),
    chats=st.booleans(),
    alike=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_stored_text_is_split_and_packed_as_a_whole(
    lengths: list[int],
    order: list[int],
    fraction: float,
    seq_len: int,
    size: int,
    at_once: int,
    chats: bool,
    alike: bool,
) -> None:
    # No token is in two of the five documents, which come in any order and number of copies.
    random = np.random.default_rng(sum(lengths))
    distinct = [50 * i + np.arange(lengths[i]) for i in range(5)]
    if chats:
        distinct[1::2] = [counted_tokens(x, random.random(len(x)) < 0.5) for x in distinct[1::2]]
    digests = [hashlib.sha256(bytes([i])).digest() for i in range(5)]
    if alike:  # hashes that begin with the same 8 bytes
        digests = [bytes(8) + digest[8:] for digest in digests]
    documents, keys = [distinct[i] for i in order], [digests[i] for i in order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AT_ONCE", at_once)
        split, parts = split_in_shards(documents, keys, fraction, seq_len, size)
    for part, text, expected in zip(
        split, parts, held_out(documents, keys, fraction, seq_len), strict=True
    ):
        whole = packed_whole(expected, seq_len, BYTES)
        assert text.size == len(whole.tokens) and len(text) == len(whole)
        counted = whole.counted
        if text.size:
            np.testing.assert_array_equal(tokens_of(text), whole.tokens)
            assert part.counts == (counted is None or bool(counted.any()))
        windows = random.permutation(len(whole))
        for name, values in whole.batch(windows).items():
            given_values = text.batch(windows)[name]
            np.testing.assert_array_equal(given_values, values, err_msg=name)
            assert given_values.dtype == values.dtype


def test_many_documents_as_a_whole() -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, 256, n) for n in random.integers(0, 200, 3_000)]
    documents += documents[:500]
    keys = [hashlib.sha256(document.tobytes()).digest() for document in documents]
    for fraction in (0.001, 0.05, 0.5):
        _, parts = split_in_shards(documents, keys, fraction, 16, 700)
        for text, expected in zip(parts, held_out(documents, keys, fraction, 16), strict=True):
            np.testing.assert_array_equal(tokens_of(text), packed_whole(expected, 16, BYTES).tokens)


def test_equal_documents_are_held_out_by_share() -> None:
    documents = [np.full(99, i) for i in range(100)]
    keys = [hashlib.sha256(bytes([i])).digest() for i in range(100)]
    _, (train, validation) = split_in_shards(documents, keys, 0.1, 16, 30)
    assert (train.size, validation.size) == (9_000, 1_000)
    assert not {*tokens_of(train).tolist()} & {*tokens_of(validation).tolist()} - {BYTES.eos_id}


def test_one_long_document_gives_its_end() -> None:
    document = np.arange(1000) % 250
    _, (train, validation) = split_in_shards([document], [bytes(32)], 0.1, 16, 1)
    assert tokens_of(train).tolist() == [*document[:900].tolist(), BYTES.eos_id]
    assert tokens_of(validation).tolist() == [*document[900:].tolist(), BYTES.eos_id]
