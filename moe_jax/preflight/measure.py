"""Compiling programs and reading what the compiler says of them."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from moe_jax.errors import UserError
from moe_jax.preflight.chips import Target
from moe_jax.preflight.programs import TRAIN_STEP, Planned
from moe_jax.profiling.memory import compiled_bytes
from moe_jax.profiling.transfers import group_axes, transfers
from moe_jax.runtime.platform import compiling_for
from moe_jax.utils.progress import say
from moe_jax.utils.units import duration

# Seconds that compiling takes for each line of StableHLO, until a program of this run has shown it.
SECONDS_PER_LINE = 0.02


class Sent(NamedTuple):
    """The collectives of a program of one kind along the same axes, in one run of it."""

    kind: str
    axes: tuple[str, ...]
    members: tuple[int, ...]  # places in the mesh of the devices of one group
    times: int
    bytes: int  # that leave each device, at the least
    hidden_bytes: int  # of those, beside computation
    dynamic: bool  # some are in a loop of unknown length: one pass is counted


@dataclasses.dataclass(frozen=True)
class Measured:
    """A compiled program; sizes are bytes per device."""

    name: str
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    code_bytes: int
    resident_bytes: int  # what else lies there while it runs
    peak_bytes: int  # all together; donated arguments and the results in their place count once
    compile_seconds: float
    collectives: tuple[Sent, ...]
    flops: float  # that the model needs at least
    refused: str = ""  # why the compiler gave no program; sizes are then unknown, and 0

    def fits(self, memory: float) -> bool:
        """Whether a device with that much memory can run it."""
        return not self.refused and self.peak_bytes <= memory


def compile_all(planned: list[Planned], target: Target, mesh: Mesh) -> Iterator[Measured]:
    """Compiles each program for the target's devices; says which one, and about how long it
    takes.
    """
    spent, lines_done = 0.0, 0
    with compiling_for(target.devices[0]):
        for number, program in enumerate(planned, 1):
            lowered = program.lower()
            lines = lowered.as_text().count("\n")
            rate = spent / lines_done if lines_done else SECONDS_PER_LINE
            say(
                f"{number} of {len(planned)}: compiling {program.name} for {target.topology}, "
                f"about {duration(lines * rate)}"
            )
            measured = _compile(program, lowered, mesh, target)
            spent, lines_done = spent + measured.compile_seconds, lines_done + lines
            yield measured


def _compile(program: Planned, lowered: jax.stages.Lowered, mesh: Mesh, target: Target) -> Measured:
    """Raises UserError where the compiler fails for another reason than memory."""
    began = time.perf_counter()
    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(_failure(program.name, target, str(error))) from error
        seconds, held = time.perf_counter() - began, program.resident_bytes
        return Measured(program.name, 0, 0, 0, 0, held, 0, seconds, (), 0, _used(str(error)))
    seconds = time.perf_counter() - began
    sizes: dict[str, Any] = compiled_bytes(compiled)
    analysis = compiled.memory_analysis()
    code, donated = analysis.generated_code_size_in_bytes, analysis.alias_size_in_bytes
    return Measured(
        name=program.name,
        **sizes,
        code_bytes=code,
        resident_bytes=program.resident_bytes,
        peak_bytes=sum(sizes.values()) - donated + code + program.resident_bytes,
        compile_seconds=seconds,
        collectives=tuple(sent_by(compiled.as_text(), dict(mesh.shape))),
        flops=program.flops,
    )


def _failure(name: str, target: Target, error: str) -> str:
    """That the compiler failed, in one sentence."""
    first = error.strip().partition("\n")[0].rstrip(".")
    remedy = {
        TRAIN_STEP: "--set train.accumulation=1, another mesh, or another --topology may compile",
    }.get(name, "another mesh or another --topology may compile")
    return (
        f'--topology {target.topology}: the compiler failed at {name} with "{first}", which is a '
        f"fault of its own and does not mean that the program does not fit: {remedy}."
    )


def _used(error: str) -> str:
    """What the compiler says of the memory that it would need, in one line."""
    told = re.search(r"Used ([\d.]+\S+) of ([\d.]+\S+) (\w+)", error)
    if told:
        return f"needs {told[1]} of {told[2]} {told[3]}".rstrip(".")
    return error.partition("\n")[0]


def sent_by(hlo: str, shape: dict[str, int]) -> list[Sent]:
    """A program's collectives, summed by kind and axes, those that send most first."""
    totals: dict[tuple[str, tuple[str, ...], int], list[Any]] = {}
    for one in transfers(hlo):
        key = one.kind, group_axes(one.members, shape), len(one.members)
        total = totals.setdefault(key, [one.members, 0, 0, 0, False])
        total[1] += one.times
        total[2] += one.sent
        total[3] += one.sent * one.hidden
        total[4] |= one.dynamic
    sums = [Sent(kind, axes, *total) for (kind, axes, _), total in totals.items()]
    return sorted(sums, key=lambda sent: -sent.bytes)
