"""The table of kept blocks of prompts."""

from __future__ import annotations

from moe_jax.serving.prefix_blocks import PrefixBlocks


def test_blocks_are_found_by_all_that_comes_before_them() -> None:
    blocks = PrefixBlocks(count=8, size=2)
    assert blocks.find([1, 2, 3, 4, 5]) == []
    assert blocks.keep([1, 2, 3, 4, 5]) == [(0, 0), (1, 1)]
    assert blocks.keep([1, 2, 3, 4]) == []
    assert blocks.find([1, 2, 3, 4, 9]) == [0, 1]
    assert blocks.find([1, 2, 3, 4]) == [0]  # one token is left to read
    assert blocks.find([1, 2, 9, 4, 5]) == [0]
    assert blocks.find([3, 4, 5]) == []
    assert blocks.keep([3, 4, 1, 2]) == [(2, 0), (3, 1)]  # the same tokens elsewhere


def test_what_was_used_longest_ago_goes_and_the_end_of_a_text_before_its_beginning() -> None:
    blocks = PrefixBlocks(count=4, size=1)
    blocks.keep([1, 2])
    blocks.keep([3, 4])
    assert blocks.find([1, 2, 0]) == [0, 1]
    assert blocks.keep([5]) == [(3, 0)]  # in place of 4 behind 3
    assert blocks.find([3, 4, 0]) == [2] and blocks.find([5, 0]) == [3]
    assert blocks.find([1, 2, 0]) == [0, 1]


def test_of_a_text_longer_than_the_cache_its_beginning_is_kept() -> None:
    blocks = PrefixBlocks(count=2, size=1)
    assert blocks.keep([1, 2, 3]) == [(0, 0), (1, 1)]
    assert blocks.find([1, 2, 3]) == [0, 1]
    assert PrefixBlocks(count=0, size=1).keep([1, 2]) == []
