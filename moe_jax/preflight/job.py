"""`moe-jax preflight`: what a run's programs would take on chips that are not there.

result = preflight(load_config(path, overrides), "v5p:4x4x4")
result.as_json()["fits"]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from moe_jax import __version__
from moe_jax.config.schema import Config
from moe_jax.errors import UserError
from moe_jax.preflight.advice import remedies
from moe_jax.preflight.bounds import link_of, time_bound
from moe_jax.preflight.chips import Target, find_target
from moe_jax.preflight.measure import Measured, compile_all
from moe_jax.preflight.programs import (
    TRAIN_STEP,
    Planned,
    training_program,
    training_programs,
)
from moe_jax.preflight.serving import Serving, serving_programs
from moe_jax.runtime.compile_only import libtpu_version
from moe_jax.runtime.platform import compiling_for
from moe_jax.utils.units import one_of_these


class MeshPrograms(NamedTuple):
    """The programs of a mesh: those of training, or those of inference."""

    mesh: Mesh
    programs: list[Measured]


@dataclass(frozen=True)
class Preflight:
    """What was measured."""

    target: Target
    parts: list[MeshPrograms]
    remedies: list[str]  # where a program does not fit

    @property
    def programs(self) -> list[Measured]:
        """All of them."""
        return [program for part in self.parts for program in part.programs]

    @property
    def fits(self) -> bool:
        """Whether each program fits the memory of a device."""
        return all(program.fits(self.target.chip.memory) for program in self.programs)

    def as_json(self) -> dict[str, Any]:
        """All figures; those of the training step, or else of the last program, again at the
        top.
        """
        chip, last = self.target.chip, self.programs[-1]
        step = next((one for one in self.programs if one.name == TRAIN_STEP), last)
        return {
            "topology": self.target.topology,
            "devices": len(self.target.devices),
            "chip": chip.name,
            "memory_bytes": round(chip.memory),
            "assumed_rates": {
                "flops": chip.flops,
                "memory": chip.memory_rate,
                "links": chip.links,
                "network": chip.network,
            },
            "estimated": self.target.estimated,
            "versions": versions(),
            "fits": self.fits,
            "remedies": self.remedies,
            "temp_bytes": step.temp_bytes,
            "compile_seconds": step.compile_seconds,
            "collective_bytes": sum(sent.bytes for sent in step.collectives),
            "all_to_all_hidden_fraction": hidden_fraction(step, "all-to-all"),
            "programs": [
                _as_json(one, self.target, part.mesh)
                for part in self.parts
                for one in part.programs
            ],
        }


def preflight(
    topology: str,
    config: Config | None = None,
    serving: Serving | None = None,
    only: Sequence[str] = (),
) -> Preflight:
    """Compiles the programs of a training run, of a model that is served, or of both; `only` those
    of these names. Raises UserError where the topology is unknown, the model cannot be on it, there
    is no program of such a name, or the compiler fails.
    """
    target, planned = find_target(topology), list[tuple[Mesh, list[Planned]]]()
    with compiling_for(target.devices[0]):
        if config is not None:
            program = training_program(config, target)
            planned.append((program.mesh, training_programs(config, program)))
        if serving is not None:
            planned.append(serving_programs(serving, target))
        parts = [
            MeshPrograms(mesh, list(compile_all(programs, target, mesh)))
            for mesh, programs in _chosen(planned, only)
        ]
    measured = [program for part in parts for program in part.programs]
    return Preflight(target, parts, remedies(measured, target, config, serving))


def _chosen(
    planned: list[tuple[Mesh, list[Planned]]], only: Sequence[str]
) -> list[tuple[Mesh, list[Planned]]]:
    """The programs of these names, by default all."""
    names = [one.name for _, programs in planned for one in programs]
    for name in only:
        if name not in names:
            raise UserError(f"--program {name} is none of this run: choose {one_of_these(names)}.")
    return [
        (mesh, [one for one in programs if not only or one.name in only])
        for mesh, programs in planned
    ]


def hidden_fraction(program: Measured, kind: str) -> float:
    """The part of the bytes of its collectives of one kind that computation hides; 0 without
    any.
    """
    sent = [one for one in program.collectives if one.kind in (kind, f"ragged-{kind}")]
    total = sum(one.bytes for one in sent)
    return sum(one.hidden_bytes for one in sent) / total if total else 0.0


def versions() -> dict[str, str | None]:
    """Of what decided the figures."""
    return {
        "moe-jax": __version__,
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "libtpu": libtpu_version(),
    }


def _as_json(program: Measured, target: Target, mesh: Mesh) -> dict[str, Any]:
    entry = dataclasses.asdict(program)
    entry["fits"] = program.fits(target.chip.memory)
    bound = time_bound(program, target, mesh)
    entry["bound_seconds"] = {**bound._asdict(), "all": bound.seconds, "by": bound.by}
    entry["collectives"] = [
        {
            **{key: value for key, value in sent._asdict().items() if key != "members"},
            "devices": len(sent.members),
            "link": link_of(sent, target.chip, mesh).name,
        }
        for sent in program.collectives
    ]
    return entry
