"""Which row has which blocks, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.serving.cache_blocks import CacheBlocks
from moe_jax.serving.engine_size import EngineSize

# 10 blocks of 16 tokens, two to a chunk.
SIZE = EngineSize(max_batch=4, context=160, cache_tokens=160, chunk=32, block=16)


class Table:
    """What the devices are told."""

    def __init__(self, size: EngineSize, window: int | None = None, has_full: bool = True):
        self.tables = np.zeros((2, size.max_batch, size.parts), int)
        self.blocks = CacheBlocks(size, window, has_full, self.place)

    def place(self, slot: int, windowed: bool, part: int, block: int) -> None:
        self.tables[int(windowed), slot, part] = block

    def read(self, slot: int, prompt: list[int]) -> int:
        """A prompt in chunks; how many of its tokens were there."""
        self.tables[:, slot] = 0
        found = self.blocks.begin(slot, prompt)
        for start in range(found, len(prompt), SIZE.chunk):
            end = min(start + SIZE.chunk, len(prompt))
            assert self.blocks.extend(slot, start, end)
            self.blocks.keep(slot, end)
        return found


def test_a_row_takes_a_block_when_it_comes_to_it() -> None:
    table = Table(SIZE)
    assert table.read(0, list(range(33))) == 0
    assert np.count_nonzero(table.tables) == 3 and table.blocks.in_use == pytest.approx(0.3)
    for length in range(33, 160):
        assert table.blocks.extend(0, length, length + 1)
        assert np.count_nonzero(table.tables) == length // 16 + 1
    assert len(set(table.tables[0, 0])) == 10 and 0 not in table.tables[0, 0]
    table.blocks.begin(1, [1])
    assert not table.blocks.extend(1, 0, 1)
    assert not table.blocks.fits([1], 0)
    table.blocks.end(0)
    assert table.blocks.extend(1, 0, 1) and table.blocks.fits([1], 0)


def test_whole_chunks_are_shared_and_a_token_is_left() -> None:
    table = Table(SIZE)
    text = list(range(80))
    table.read(0, text)
    assert table.read(1, text) == 64
    assert (table.tables[0, 0, :4] == table.tables[0, 1, :4]).all()
    assert table.tables[0, 0, 4] != table.tables[0, 1, 4]
    assert table.read(2, [*text[:63], 1000, 1001]) == 32
    table.blocks.end(2)
    assert table.read(2, text[:64]) == 32  # the last token has to be read
    for slot in range(3):
        table.blocks.end(slot)
    assert table.blocks.in_use == 0
    assert table.read(3, text) == 64
    # Running rows' blocks are no room for others, and shared ones need none.
    assert table.blocks.fits([*text[:64], 1], 15) and not table.blocks.fits(text[1:], 0)


def test_what_was_used_longest_ago_goes_and_the_end_of_a_text_before_its_beginning() -> None:
    table = Table(SIZE)
    one, two = [list(range(start, start + 65)) for start in (0, 100)]
    table.read(0, one)
    table.blocks.end(0)
    table.read(0, two)
    table.blocks.end(0)
    assert table.read(0, list(range(200, 233))) == 0  # 3 blocks: 2 were free, one of text one goes
    assert table.read(1, one) == 32
    table.blocks.end(1)
    # The other text's end has gone for that, not its beginning.
    assert table.read(1, two) == 32


def test_layers_with_a_window_give_up_what_lies_behind_it() -> None:
    table = Table(SIZE, window=20)
    table.read(0, list(range(100)))
    assert np.flatnonzero(table.tables[1, 0]).tolist() == [4, 5, 6]
    assert np.count_nonzero(table.tables[0, 0]) == 7
    for length in range(100, 160):
        assert table.blocks.extend(0, length, length + 1)
        seen = range((length - 19) // 16, length // 16 + 1)
        assert np.flatnonzero(table.tables[1, 0]).tolist() == list(seen)
    # Kept is what a text that goes on after 96 tokens sees, of the others the beginning.
    assert table.blocks.begin(1, list(range(99))) == 96
    assert np.flatnonzero(table.tables[1, 1]).tolist() == [4, 5]
    assert np.count_nonzero(table.tables[0, 1]) == 6


def test_rows_whose_layers_all_have_windows_always_fit() -> None:
    size = EngineSize(max_batch=4, context=160, chunk=32, block=16)
    table = Table(size, window=20, has_full=False)
    for slot in range(4):
        assert table.blocks.fits(list(range(150)), 0)
        table.read(slot, list(range(slot, slot + 150)))
    assert not table.tables[0].any() and (np.count_nonzero(table.tables[1], axis=1) == 4).all()


def test_at_mixed_lengths_less_than_a_tenth_of_the_cache_is_wasted() -> None:
    """Requests of 16 to 4,096 tokens, as many as there is room for: blocks that are taken and hold
    no token, or that no request can have although one waits.
    """
    size = EngineSize(max_batch=256, context=4096, cache_tokens=65536)
    table, chance = Table(size), np.random.default_rng(0)
    for _ in range(5):
        lengths: list[int] = []
        while True:
            length = int(chance.integers(16, 4097))
            if not table.blocks.extend(*_begun(table, len(lengths), length)):
                break
            lengths.append(length)
        assert sum(lengths) > 0.9 * 65536 - length and table.blocks.in_use > 0.9
        taken = np.count_nonzero(table.tables[0, : len(lengths)]) * size.block
        assert sum(lengths) > 0.95 * taken
        for slot in range(len(lengths) + 1):
            table.blocks.end(slot)
            table.tables[:, slot] = 0


def _begun(table: Table, slot: int, length: int) -> tuple[int, int, int]:
    table.blocks.begin(slot, [slot])
    return slot, 0, length


def test_a_cache_without_room_for_one_request_is_refused() -> None:
    with pytest.raises(UserError, match=r"--cache-tokens 100 .* --max-context 160"):
        EngineSize(max_batch=4, context=160, cache_tokens=100)
