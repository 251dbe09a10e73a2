"""Reading a compiled program: what its collectives move and what its matmuls cost, from
`compiled.as_text()`.

XLA's own cost analysis counts the body of a loop once. Here every instruction is weighted by the
trip counts of the loops around it, which XLA writes beside counted loops; XLA:TPU does not, and
there a loop that goes on while its counter is below a constant counts from 0, as JAX's do. A loop
whose length is known only at run time counts as one pass, and what stands inside such loops is
reported apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")
NOT_COUNTED = ("convolution", "ragged-dot")  # matmuls of other kinds: `uncounted` names them
_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "token": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
_GEMM = re.compile(r'custom_call_target="(__cublas\$(?:lt\$)?(?:gemm|matmul)\S*|__onednn\$matmul)"')


class Instruction(NamedTuple):
    """One instruction; `rest` is everything after its operands."""

    name: str
    type: str
    op: str
    operands: list[str]
    rest: str


class Visit(NamedTuple):
    """An instruction in its place. `runs` is the product of the known trip counts around it."""

    instruction: Instruction
    scope: dict[str, Instruction]
    runs: int
    unknown: (
        int  # loops and branches around it of which only the run can tell how often they are taken
    )
    computation: str  # that it is part of


class Collective(NamedTuple):
    """All collectives of one kind, on each device, in one run of the program."""

    op: str
    group: int  # devices that take part; with 1 nothing moves
    times: int
    # size of the larger of operand and result: what a device holds when all parts are together
    bytes: int
    dynamic: bool  # inside a loop of unknown length: one pass is counted


class Dot(NamedTuple):
    """A matmul on each device: `flops` for one run, of `runs` in counted loops, inside `unknown`
    loops of unknown length.
    """

    flops: int
    runs: int
    unknown: int
    dims: tuple[int, ...]  # of the result, then those contracted


def _close(text: str, start: int) -> int:
    """Index past the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]!r}")


def _instruction(name: str, text: str) -> Instruction:
    end = _close(text, 0) if text.startswith("(") else text.index(" ")
    kind, body = text[:end], text[end:].lstrip()
    opening = body.index("(")
    closing = _close(body, opening)
    operands = re.sub(r"/\*.*?\*/", "", body[opening + 1 : closing - 1])
    names = [
        part.split()[-1].lstrip("%")
        for part in re.split(r",\s*(?![^\[{(]*[\]})])", operands)
        if part.strip()
    ]
    return Instruction(name, kind, body[:opening], names, body[closing:])


def parse(hlo: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
    """The name of the entry computation, and every computation's instructions by name."""
    entry = ""
    computations: dict[str, dict[str, Instruction]] = {}
    scope: dict[str, Instruction] | None = None
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            scope = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):
            # (two close what a kernel's attributes left open on the lines before)
            scope = None
        elif scope is not None and (match := _INSTRUCTION.match(line)):
            scope[match[1]] = _instruction(match[1], match[2])
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return entry, computations


def walk(hlo: str) -> Iterator[Visit]:
    """Every instruction that the program runs, fusions, calls and loop bodies opened, with how
    often.
    """
    entry, computations = parse(hlo)

    def visit(name: str, runs: int, unknown: int) -> Iterator[Visit]:
        scope = computations[name]
        for instruction in scope.values():
            yield Visit(instruction, scope, runs, unknown, name)
            if instruction.op not in ("while", "fusion", "call", "async-start", "conditional"):
                continue
            trips = _trips(instruction, computations) if instruction.op == "while" else 1
            endless = trips is None or instruction.op == "conditional"
            for called in _CALLED.findall(instruction.rest):
                for inner in called.strip("{}").split(","):
                    yield from visit(
                        inner.strip().lstrip("%"),
                        runs * (1 if trips is None else trips),
                        unknown + endless,
                    )

    yield from visit(entry, 1, 0)


def _trips(loop: Instruction, computations: dict[str, dict[str, Instruction]]) -> int | None:
    """How often a loop's body runs; None where only the run can tell."""
    if written := _TRIPS.search(loop.rest):
        return int(written[1])
    condition = _CONDITION.search(loop.rest)
    scope = computations[condition[1]] if condition else {}
    *_, last = scope.values() if scope else (None,)
    if last is None or last.op != "compare" or "direction=LT" not in last.rest:
        return None
    limit = scope[last.operands[1]]
    number = re.fullmatch(r"-?\d+", limit.operands[0]) if limit.op == "constant" else None
    return int(number[0]) if number else None


def shapes(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dims) of each array in a type, tuples flattened: `(f32[2,3]{1,0}, s32[])` gives
    two.
    """
    return [
        (dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(kind)
    ]


def type_bytes(kind: str) -> int:
    """Bytes of an array type or of all arrays of a tuple."""

    def bits(dtype: str) -> int:
        return _BITS[dtype] if dtype in _BITS else int(re.sub(r"\D", "", dtype))

    return sum(bits(dtype) * math.prod(dims) for dtype, dims in shapes(kind)) // 8


def group_size(rest: str, devices: int) -> int:
    """Devices in a group of `replica_groups`, in any of its three notations; all of them where it
    is empty.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{([^}]*)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in used)
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return pairs[1].count("{")
    return devices


def collectives(hlo: str) -> list[Collective]:
    """The program's collectives, summed by kind, group size and whether their loop's length is
    known.

    Asynchronous pairs count once. A variadic all-to-all or all-reduce counts the sum of its arrays.
    """
    header = re.search(r"(?:num_partitions|replica_count)=(\d+)", hlo)
    devices = int(header[1]) if header else 1
    totals: dict[tuple[str, int, bool], list[int]] = {}
    for instruction, scope, runs, unknown, _ in walk(hlo):
        op = instruction.op.removesuffix("-done")
        if op not in COLLECTIVES:
            continue
        # The start of a pair has operand and result in its type; the end has the result alone, but
        # not the groups.
        rest = (
            scope[instruction.operands[0]].rest
            if instruction.op.endswith("-done")
            else instruction.rest
        )
        group = group_size(rest, devices)
        size = type_bytes(instruction.type) * (group if op == "reduce-scatter" else 1)
        total = totals.setdefault((op, group, unknown > 0), [0, 0])
        total[0] += runs
        total[1] += runs * size
    return [
        Collective(op, group, count, size, dynamic)
        for (op, group, dynamic), (count, size) in sorted(totals.items())
    ]


def dots(hlo: str) -> list[Dot]:
    """Every matmul: `dot`, wherever it is fused, and the library calls that XLA rewrites dots to on
    CPU and GPU.
    """
    matmuls = []
    for instruction, scope, runs, unknown, _ in walk(hlo):
        if instruction.op != "dot" and not (
            instruction.op == "custom-call" and _GEMM.search(instruction.rest)
        ):
            continue
        contracted = _CONTRACTED.search(instruction.rest)
        left = shapes(scope[instruction.operands[0]].type)[0][1]
        summed = (
            tuple(left[int(dim)] for dim in re.findall(r"\d+", contracted[1])) if contracted else ()
        )
        dims = shapes(instruction.type)[0][1] + summed
        matmuls.append(Dot(2 * math.prod(dims), runs, unknown, dims))
    return matmuls


def dot_flops(hlo: str) -> tuple[int, int]:
    """FLOPs per device of all matmuls in straight code and counted loops, and of one pass of those
    in other loops.
    """
    known = unknown = 0
    for dot in dots(hlo):
        if dot.unknown:
            unknown += dot.flops * dot.runs
        else:
            known += dot.flops * dot.runs
    return known, unknown


def uncounted(hlo: str) -> list[str]:
    """Operations that may hold matmuls which `dots` does not count: convolutions, ragged dots and
    foreign calls.
    """
    names = set()
    for instruction, *_ in walk(hlo):
        if instruction.op in NOT_COUNTED:
            names.add(instruction.op)
        elif instruction.op == "custom-call" and not _GEMM.search(instruction.rest):
            target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
            names.add(target[1] if target else instruction.name)
    return sorted(names)
