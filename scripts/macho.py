"""Reads a Mach-O library for arm64 far enough to see which names its functions use; numpy alone.

    library = Library(path.read_bytes())
    library.names_used()        # {address of a function: names that its code points to}

Nothing is executed or copied: addresses, symbols and the strings that instructions point to.
"""

from __future__ import annotations

import re
import struct
from collections import Counter, defaultdict
from functools import cached_property
from typing import NamedTuple

import numpy as np

NAME = re.compile(rb"(?<=\x00)(?:stablehlo|func|chlo|mhlo|sdy|mps)\.[a-zA-Z_0-9]+(?=\x00)")
ARM64 = 0x0100000C
NEAR = 9  # instructions within which a page's address is completed


class Section(NamedTuple):
    """Where a section lies in memory and in the file."""

    address: int
    size: int
    offset: int

    def holds(self, address: int) -> bool:
        """Whether an address lies in it."""
        return self.address <= address < self.address + self.size


class Library:
    """One arm64 library, thin or inside a universal file."""

    def __init__(self, content: bytes):
        self.content = _arm64_part(content)
        self.sections: dict[str, Section] = {}
        self.symbols: dict[int, str] = {}
        """Mangled names of functions and data by address; few where the library is stripped."""
        self._starts = (0, 0)
        self._read_commands()

    @cached_property
    def functions(self) -> np.ndarray:
        """Addresses at which functions start, ascending."""
        offset, size = self._starts
        address, starts, at = 0, [], offset
        while at < offset + size:
            step, shift = 0, 0
            while True:
                byte = self.content[at]
                at += 1
                step |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            if not step:
                break
            address += step
            starts.append(address)
        return np.array(starts, np.int64)

    def function_of(self, address: int) -> int:
        """Start of the function that holds an instruction."""
        return int(self.functions[np.searchsorted(self.functions, address, "right") - 1])

    def end_of(self, function: int) -> int:
        """Where a function ends."""
        after = int(np.searchsorted(self.functions, function, "right"))
        text = self.sections["__text"]
        last = after == len(self.functions)
        return text.address + text.size if last else int(self.functions[after])

    @cached_property
    def code(self) -> np.ndarray:
        """All instructions, int64 [N]."""
        text = self.sections["__text"]
        return np.frombuffer(self.content, "<u4", text.size // 4, text.offset).astype(np.int64)

    @cached_property
    def pointers(self) -> tuple[np.ndarray, np.ndarray]:
        """(where, to): instructions that form the address `to`, or load 16 bytes from it."""
        code, start = self.code, self.sections["__text"].address
        where_N = start + 4 * np.arange(len(code))
        pages = np.nonzero((code & 0x9F000000) == 0x90000000)[0]
        offset = (((code[pages] >> 5) & 0x7FFFF) << 2) | ((code[pages] >> 29) & 3)
        page = (where_N[pages] & ~0xFFF) + (
            np.where(offset >> 20, offset - (1 << 21), offset) << 12
        )
        where, to = [], []
        for distance in range(1, NEAR):
            inside = pages + distance < len(code)
            first, second = code[pages[inside]], code[pages[inside] + distance]
            same_register = ((second >> 5) & 31) == (first & 31)
            for mask, kind, scale in ((0xFFC00000, 0x91000000, 0), (0xFFC00000, 0x3DC00000, 4)):
                fits = same_register & ((second & mask) == kind)
                where.append(where_N[pages[inside] + distance][fits])
                to.append(page[inside][fits] + (((second[fits] >> 10) & 0xFFF) << scale))
        return np.concatenate(where), np.concatenate(to)

    @cached_property
    def names(self) -> dict[int, str]:
        """Names of operations and of custom calls among the strings, by address."""
        strings = self.sections["__cstring"]
        part = b"\0" + self.content[strings.offset : strings.offset + strings.size]
        shift = strings.address - 1
        return {shift + m.start(): m.group().decode() for m in NAME.finditer(part)}

    def names_used(self) -> dict[int, set[str]]:
        """The names that each function's code points to."""
        where, to = self.pointers
        named = np.isin(to, np.fromiter(self.names, np.int64))
        used: dict[int, set[str]] = defaultdict(set)
        for at, name in zip(where[named], to[named], strict=True):
            used[self.function_of(at)].add(self.names[int(name)])
        return dict(used)

    def calls(self, among: set[int]) -> dict[int, Counter[int]]:
        """How often each function of `among` calls which functions; and callers outside it, by -1:
        those that call the same ones.
        """
        code, start = self.code, self.sections["__text"].address
        at = np.nonzero((code >> 26) == 0b100101)[0]
        offset = code[at] & 0x3FFFFFF
        to = start + 4 * (at + np.where(offset >> 25, offset - (1 << 26), offset))
        callers = self.functions[np.searchsorted(self.functions, start + 4 * at, "right") - 1]
        inside = np.isin(callers, np.fromiter(among, np.int64))
        found: dict[int, Counter[int]] = defaultdict(Counter)
        for caller, callee in zip(callers[inside], to[inside], strict=True):
            found[int(caller)][int(callee)] += 1
        known = np.unique(to[inside])
        for callee in to[~inside & np.isin(to, known)]:
            found[-1][int(callee)] += 1
        return dict(found)

    def users_of(self, text: str, whole: bool = False) -> list[int]:
        """Functions that point to a string that contains `text`, or is it where `whole`."""
        strings = self.sections["__cstring"]
        wanted = b"\0" + text.encode() + b"\0" if whole else text.encode()
        at = self.content.find(wanted, strings.offset, strings.offset + strings.size)
        if at < 0:
            return []
        begin = at + 1 if whole else self.content.rindex(b"\0", 0, at) + 1
        where, to = self.pointers
        hits = where[to == strings.address + begin - strings.offset]
        return sorted({self.function_of(hit) for hit in hits})

    def pairs_loaded(self, function: int) -> list[tuple[int, int]]:
        """Pairs of 64-bit constants that a function's code points to."""
        constants = self.sections["__const"]
        where, to = self.pointers
        inside = (where >= function) & (where < self.end_of(function))
        return [
            struct.unpack_from("<2q", self.content, constants.offset + int(at) - constants.address)
            for at in to[inside]
            if constants.holds(int(at))
        ]

    def immediates(self, function: int) -> set[int]:
        """Numbers that a function's code builds or compares with: short strings are among them."""
        begin = self.sections["__text"].address
        found: set[int] = set()
        register: dict[int, int] = {}
        for word in self.code[
            (function - begin) // 4 : (self.end_of(function) - begin) // 4
        ].tolist():
            if (word >> 23) & 0x3F == 0b100101:  # movn, movz, movk
                kind, target = (word >> 29) & 3, word & 31
                value, shift = (word >> 5) & 0xFFFF, 16 * ((word >> 21) & 3)
                if kind == 3:
                    value = (register.get(target, 0) & ~(0xFFFF << shift)) | value << shift
                else:
                    value = value << shift if kind else ~(value << shift) & (1 << 64) - 1
                register[target] = value
                found.add(value)
            elif word & 0x7F80001F == 0x7100001F:  # cmp with a number
                found.add((word >> 10) & 0xFFF)
        return found

    def compares_with(self, function: int, text: str) -> bool:
        """Whether a function's code holds all pieces in which a compiler compares a string with
        `text`.
        """
        found = self.immediates(function)
        return any(
            all(int.from_bytes(piece, "little") in found for piece in pieces)
            for pieces in _pieces(text.encode())
        )

    def mentions(self, function: int, text: str) -> bool:
        """Whether a function's code points to exactly this string or compares with it."""
        return self.compares_with(function, text) or function in self.users_of(text, whole=True)

    def table(self, symbol: str) -> list[str]:
        """Names to which the array of pointers under a symbol points."""
        begin = next((at for at, name in self.symbols.items() if symbol in name), None)
        if begin is None:
            return []
        end = min(at for at in self.symbols if at > begin)
        section = next(s for s in self.sections.values() if s.holds(begin))
        words = np.frombuffer(
            self.content, "<u8", (end - begin) // 8, section.offset + begin - section.address
        )
        targets = words & np.uint64((1 << 36) - 1)  # the rest of a chained fixup is bookkeeping
        return [self.names[int(to)] for to in targets if int(to) in self.names]

    def _read_commands(self) -> None:
        count = struct.unpack_from("<I", self.content, 16)[0]
        at = 32
        for _ in range(count):
            command, size = struct.unpack_from("<2I", self.content, at)
            if command == 0x19:
                self._read_segment(at)
            elif command == 0x2:
                self._read_symbols(at)
            elif command == 0x26:
                self._starts = struct.unpack_from("<2I", self.content, at + 8)
            at += size

    def _read_segment(self, at: int) -> None:
        (sections,) = struct.unpack_from("<I", self.content, at + 64)
        for number in range(sections):
            head = at + 72 + 80 * number
            name, segment = (
                self.content[head + part : head + part + 16].rstrip(b"\0").decode()
                for part in (0, 16)
            )
            key = name if segment == "__TEXT" else f"{segment},{name}"
            self.sections[key] = Section(*struct.unpack_from("<2QI", self.content, head + 32))

    def _read_symbols(self, at: int) -> None:
        symbols, count, strings, _ = struct.unpack_from("<4I", self.content, at + 8)
        for number in range(count):
            name, kind, _, _, address = struct.unpack_from(
                "<IBBHQ", self.content, symbols + 16 * number
            )
            if kind & 0xE0 == 0 and kind & 0xE == 0xE:  # defined in a section, not for a debugger
                end = self.content.index(b"\0", strings + name)
                self.symbols.setdefault(address, self.content[strings + name : end].decode())


def _arm64_part(content: bytes) -> bytes:
    if content[:4] != b"\xca\xfe\xba\xbe":
        return content
    (count,) = struct.unpack_from(">I", content, 4)
    for number in range(count):
        kind, _, offset, size, _ = struct.unpack_from(">5I", content, 8 + 20 * number)
        if kind == ARM64:
            return content[offset : offset + size]
    raise ValueError("the library has no part for arm64")


def _pieces(text: bytes) -> list[list[bytes]]:
    """The ways in which a compiler reads a string to compare it: words of 8, 4, 2 and 1 bytes in
    turn, or words of 8 of which the last overlaps.
    """
    in_turn, at = [], 0
    for size in (8, 4, 2, 1):
        while len(text) - at >= size:
            in_turn.append(text[at : at + size])
            at += size
    if len(text) < 8:
        return [in_turn]
    words = [text[at : at + 8] for at in range(0, len(text) - 7, 8)]
    return [in_turn, [*words, text[-8:]]]
