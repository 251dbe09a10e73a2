"""Which blocks of prompts are kept, so that prompts which begin alike are not read twice.

    blocks = PrefixBlocks(count=64, size=128)
    numbers = blocks.find(prompt)               # blocks that hold the beginning of the prompt
    for number, part in blocks.keep(prompt):    # and those to be written, with which part of it

A block is the keys and values of `size` tokens, and its name is a hash of these and of all tokens
before them (SHA-256, so that two texts with one name are not to be feared). Only whole blocks of
prompts are kept, which a chunk of the same tokens at the same place computed: a prompt that finds
them goes on from there by the programs by which it would have gone on in any case, so not a bit of
what follows is another.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np


class PrefixBlocks:
    """The table of the blocks; what is in them is on the devices."""

    def __init__(self, count: int, size: int):
        self.size = size
        self._count = count
        self._numbers: OrderedDict[bytes, int] = OrderedDict()  # that used last comes last

    def find(self, prompt: Sequence[int]) -> list[int]:
        """The blocks that hold the beginning of a prompt, at least one token of which is left."""
        names, found = list(self._names(prompt)), []
        for name in names[: (len(prompt) - 1) // self.size]:
            if name not in self._numbers:
                break
            found.append(self._numbers[name])
        self._use(names[: len(found)])
        return found

    def keep(self, prompt: Sequence[int]) -> list[tuple[int, int]]:
        """Takes in the whole blocks of a prompt: (block, its number in the prompt) for each that
        is not there yet and is to be written now.
        """
        names, new = list(self._names(prompt))[: self._count], []
        for part, name in enumerate(names):
            if name in self._numbers:
                self._numbers.move_to_end(name)
                continue
            number = len(self._numbers)
            if number == self._count:
                _, number = self._numbers.popitem(last=False)
            self._numbers[name] = number
            new.append((number, part))
        self._use(names)
        return new

    def _use(self, names: list[bytes]) -> None:
        """The blocks have been used. A text's first block comes last, for without it the others are
        of no use.
        """
        for name in reversed(names):
            self._numbers.move_to_end(name)

    def _names(self, prompt: Sequence[int]) -> Iterator[bytes]:
        name = b""
        for start in range(0, len(prompt) - self.size + 1, self.size):
            part = np.asarray(prompt[start : start + self.size], np.int32).tobytes()
            name = hashlib.sha256(name + part).digest()
            yield name
