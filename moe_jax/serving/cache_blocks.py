"""Which blocks of the cache each row has, and which are kept for prompts that begin alike.

    blocks = CacheBlocks(size, window=None, place=state.place)
    start = blocks.begin(3, prompt)                  # tokens of the prompt that are there already
    blocks.extend(3, start, start + 128)             # False where no block is free
    blocks.keep(3, start + 128)                      # so much of the prompt has been read
    blocks.end(3)

A row takes a block when it comes to it, so that less than one per row is unused. Layers with a
window have blocks of their own, of which a row gives up those that lie behind the window.

A block of a prompt that has been read is kept under a name, a hash of all tokens up to the end of
its chunk (SHA-256, so that two texts with one name are not to be feared), until another row needs
its place: those that were used longest ago go first. Only whole chunks are kept: a prompt that
finds them goes on by the programs by which it would have gone on in any case, so not a bit of what
follows is another. What generating has written has other bits, and is not kept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from moe_jax.serving.engine_size import EngineSize

Place = Callable[[int, bool, int, int], None]
"""Is told that part `part` of a slot is a block, of the layers with a window or of the others."""


class BlockPool:
    """The blocks of one kind of layers. Block 0 is nobody's: it takes what is to be thrown away."""

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, 0, -1))
        self._users = [0] * count
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, without users; newest last

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._idle)

    def take(self) -> int:
        """A block for one user; 0 where none is free."""
        if not self.free:
            return 0
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._named[self._names.pop(block)]
        self._users[block] = 1
        return block

    def find(self, name: bytes) -> int:
        """The block of this name; 0 where there is none."""
        return self._named.get(name, 0)

    def is_used(self, block: int) -> bool:
        """Whether a row has it."""
        return self._users[block] > 0

    def share(self, block: int) -> None:
        """A named block has one more user."""
        self._idle.pop(block, None)
        self._users[block] += 1

    def name(self, block: int, name: bytes) -> None:
        """A block is kept under a name, unless another one is."""
        if name not in self._named:
            self._names[block], self._named[name] = name, block

    def give_up(self, block: int) -> None:
        """A block has one user less."""
        self._users[block] -= 1
        if self._users[block]:
            return
        if block in self._names:
            self._idle[block] = None
        else:
            self._free.append(block)


class RowBlocks:
    """One row's."""

    def __init__(self, prompt: Sequence[int], size: EngineSize):
        self.names = prompt_names(prompt, size)
        self.kept = 0  # parts that have been offered under their names
        self.blocks: dict[bool, dict[int, int]] = {False: {}, True: {}}  # by part


class CacheBlocks:
    """See above. Parts of a row are numbered; part p holds tokens p * block and following."""

    def __init__(self, size: EngineSize, window: int | None, has_full: bool, place: Place):
        """`window` is that of the layers that have one; `has_full`: there are others."""
        self._size, self._window, self._place = size, window, place
        self._pools: dict[bool, BlockPool] = {}
        if has_full:
            self._pools[False] = BlockPool(size.full_blocks)
        if window is not None:
            self._pools[True] = BlockPool(size.window_blocks(window))
        self._rows: dict[int, RowBlocks] = {}

    @property
    def in_use(self) -> float:
        """The share of the blocks that rows have."""
        pool = self._pools[min(self._pools)]
        return 1 - pool.free / (pool.count - 1)

    def fits(self, prompt: Sequence[int], tokens: int) -> bool:
        """Whether a prompt and `tokens` more have room, and each running row for its next block."""
        pool = self._pools.get(False)
        if pool is None or not self._rows:  # of blocks for windows there are always enough
            return True
        names = prompt_names(prompt, self._size)
        found = [pool.find(name) for name in names[: self._found(prompt, names)]]
        shared = sum(pool.is_used(block) for block in found)
        needed = -(-(len(prompt) + tokens + 1) // self._size.block)
        return needed - shared + len(self._rows) <= pool.free

    def begin(self, slot: int, prompt: Sequence[int]) -> int:
        """A prompt takes a slot; how many of its tokens are there already."""
        row = self._rows[slot] = RowBlocks(prompt, self._size)
        parts = self._found(prompt, row.names)
        for windowed, pool in self._pools.items():
            for part in range(self._first_part(windowed, parts * self._size.block), parts):
                block = pool.find(row.names[part])
                pool.share(block)
                self._put(slot, windowed, part, block)
        row.kept = parts
        return parts * self._size.block

    def extend(self, slot: int, start: int, end: int) -> bool:
        """A row of `start` tokens gets room up to `end`. False where there are too few blocks; it
        keeps those that it got.
        """
        for windowed, pool in self._pools.items():
            mine = self._rows[slot].blocks[windowed]
            first = self._first_part(windowed, start)
            for part in [part for part in mine if part < first]:
                pool.give_up(mine[part])
                self._put(slot, windowed, part, 0)
            for part in range(start // self._size.block, -(-end // self._size.block)):
                if part not in mine:
                    block = pool.take()
                    if not block:
                        return False
                    self._put(slot, windowed, part, block)
        return True

    def keep(self, slot: int, length: int) -> None:
        """The first `length` tokens of a row's prompt are in its blocks, and may serve others."""
        row = self._rows[slot]
        chunks = length // self._size.chunk
        end = min(chunks * self._size.chunk // self._size.block, len(row.names))
        for part in range(row.kept, end):
            for windowed, pool in self._pools.items():
                if part in row.blocks[windowed]:
                    pool.name(row.blocks[windowed][part], row.names[part])
        row.kept = max(row.kept, end)

    def end(self, slot: int) -> None:
        """A row is gone. Its first blocks are the last that others take, because without them the
        rest is of no use.
        """
        row = self._rows.pop(slot)
        for windowed, pool in self._pools.items():
            for part in sorted(row.blocks[windowed], reverse=True):
                pool.give_up(row.blocks[windowed][part])

    def _put(self, slot: int, windowed: bool, part: int, block: int) -> None:
        mine = self._rows[slot].blocks[windowed]
        if block:
            mine[part] = block
        else:
            del mine[part]
        self._place(slot, windowed, part, block)

    def _first_part(self, windowed: bool, start: int) -> int:
        """The first part that a token behind `start` others looks at."""
        if not windowed:
            return 0
        assert self._window is not None
        return max(0, start - self._window + 1) // self._size.block

    def _found(self, prompt: Sequence[int], names: Sequence[bytes]) -> int:
        """Parts of a prompt's beginning that are kept, in whole chunks; a token at least is left,
        and of layers with a window only what the next token looks at need be there.
        """
        size = self._size
        step = size.chunk // size.block
        most = min(len(names), (len(prompt) - 1) // size.chunk * step)
        if (full := self._pools.get(False)) is not None:
            there = (part for part in range(most) if not full.find(names[part]))
            most = next(there, most) // step * step
        if (pool := self._pools.get(True)) is None:
            return most
        for parts in range(most, 0, -step):
            first = self._first_part(True, parts * size.block)
            if all(pool.find(names[part]) for part in range(first, parts)):
                return parts
        return 0


def prompt_names(prompt: Sequence[int], size: EngineSize) -> list[bytes]:
    """The names of the blocks of a prompt's whole chunks."""
    chain, names = b"", []
    for start in range(0, len(prompt) - size.chunk + 1, size.chunk):
        part = np.asarray(prompt[start : start + size.chunk], np.int32).tobytes()
        chain = hashlib.sha256(chain + part).digest()
        names += [chain + bytes([block]) for block in range(size.chunk // size.block)]
    return names
