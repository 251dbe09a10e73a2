"""What a compiled program sends: each of its collectives, between which devices, how many bytes
leave a device, and whether computation hides them.

    for transfer in transfers(compiled.as_text()):
        print(transfer.kind, transfer.members, transfer.sent)

XLA:TPU writes some collectives in its own ways. An all-reduce of which each device keeps its part
is a fusion named `all-reduce-scatter`. A collective that runs beside other fusions stands in each
of them, between a fusion that starts and one that ends it; it counts once, as hidden.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from moe_jax.profiling.hlo import COLLECTIVES, Instruction, Visit, group_size, type_bytes, walk

# Instructions that take no time worth hiding anything under.
IDLE = frozenset(
    (
        *("get-tuple-element", "tuple", "parameter", "constant", "bitcast", "reshape"),
        *("copy-start", "copy-done", "after-all", "partition-id", "opt-barrier"),
    )
)
KINDS = (*COLLECTIVES, "ragged-all-to-all")
_FUSED = "async_collective_fusion_config"
_STARTS = 'custom_call_target="AsyncCollectiveStart"'


class Transfer(NamedTuple):
    """A collective of a program, on each device, in one run of the program."""

    kind: str
    members: tuple[int, ...]  # places in the mesh of the devices of one group
    times: int
    bytes: int  # what a device holds when all parts are together, all times
    sent: int  # that leave a device on the shortest way, all times
    hidden: bool  # computation is scheduled between its start and its end
    dynamic: bool  # inside a loop of unknown length: one pass is counted


def transfers(hlo: str) -> list[Transfer]:
    """The program's collectives between several devices, in the order of the text."""
    header = re.search(r"num_partitions=(\d+)", hlo) or re.search(r"replica_count=(\d+)", hlo)
    devices = int(header[1]) if header else 1
    found = []
    for visit in walk(hlo):
        kind = _kind(visit)
        if kind is None:
            continue
        instruction, scope = visit.instruction, visit.scope
        done = instruction.op.endswith("-done")
        rest = scope[instruction.operands[0]].rest if done else instruction.rest
        members = first_group(rest, devices)
        if len(members) < 2:
            continue
        size = type_bytes(instruction.type)
        if kind == "reduce-scatter" and instruction.op.startswith("reduce-scatter"):
            size *= len(members)
        fused = _FUSED in instruction.rest
        found.append(
            Transfer(
                kind,
                members,
                visit.runs,
                visit.runs * size,
                visit.runs * round(size * sent_share(kind, len(members))),
                fused or (done and _computes_between(instruction, scope)),
                visit.unknown > 0,
            )
        )
    return found


def _kind(visit: Visit) -> str | None:
    """Which collective an instruction is; None for anything else, and for what is counted
    elsewhere.
    """
    op = visit.instruction.op.removesuffix("-done")
    if op not in KINDS:
        return None
    if _FUSED in visit.instruction.rest and not any(
        _STARTS in other.rest for other in visit.scope.values()
    ):
        return None
    scattered = op == "all-reduce" and visit.computation.startswith("all-reduce-scatter")
    return "reduce-scatter" if scattered else op


def sent_share(kind: str, group: int) -> float:
    """Bytes that leave each of `group` devices, over those that it holds with all parts together,
    at the least: on a ring, each part passes each link once.
    """
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group


def _computes_between(done: Instruction, scope: dict[str, Instruction]) -> bool:
    """Whether something is computed between the start of a pair and its end; instructions of a
    compiled program stand in the order in which they run.
    """
    names = list(scope)
    first, last = names.index(done.operands[0]), names.index(done.name)
    between = (scope[name].op for name in names[first + 1 : last])
    return any(op not in IDLE and not op.startswith(KINDS) for op in between)


def first_group(rest: str, devices: int) -> tuple[int, ...]:
    """The devices of the first group of an instruction, in any of HLO's notations; of a permute
    those of the first pair that sends to another device.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
        sends = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(.*?)\}", pairs[1])]
        return next((pair for pair in sends if pair[0] != pair[1]), (0,))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return tuple(map(int, listed[1].split(",")))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        dims = tuple(map(int, iota[2].split(",")))
        order = tuple(map(int, iota[3].split(","))) if iota[3] else tuple(range(len(dims)))
        numbers = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1)
        return tuple(numbers[: int(iota[1])].tolist())
    if named := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{([^}]*)\}", rest):
        axes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        used = re.findall(r"'([^']+)'", named[2])
        grid = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        index = tuple(slice(None) if axis in used else 0 for axis in axes)
        members = tuple(grid[index].reshape(-1).tolist())
        if len(members) == group_size(rest, devices):
            return members
    return tuple(range(group_size(rest, devices)))


def group_axes(members: tuple[int, ...], shape: dict[str, int]) -> tuple[str, ...]:
    """The axes of a mesh of that shape along which the members of a group differ."""
    places = np.unravel_index(np.array(members), tuple(shape.values()))
    return tuple(
        axis for axis, place in zip(shape, places, strict=True) if len(np.unique(place)) > 1
    )
