"""`moe-jax preflight`: what a run's programs would take on chips that are not there.

result = preflight(load_config(path, overrides), "v5p:4x4x4")
result.as_json()["fits"]
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax

from moe_jax import __version__
from moe_jax.config.schema import Config
from moe_jax.preflight.chips import Target, find_target
from moe_jax.preflight.measure import Measured, compile_all
from moe_jax.preflight.programs import TRAIN_STEP, training_program, training_programs
from moe_jax.runtime.compile_only import libtpu_version
from moe_jax.runtime.platform import compiling_for


@dataclass(frozen=True)
class Preflight:
    """What was measured, of all programs."""

    target: Target
    programs: list[Measured]

    @property
    def fits(self) -> bool:
        """Whether each program fits the memory of a device."""
        return all(program.fits(self.target.chip.memory) for program in self.programs)

    def as_json(self) -> dict[str, Any]:
        """All figures; those of the training step, where there is one, again at the top."""
        step = next((one for one in self.programs if one.name == TRAIN_STEP), self.programs[0])
        return {
            "topology": self.target.topology,
            "devices": len(self.target.devices),
            "chip": self.target.chip.name,
            "memory_bytes": round(self.target.chip.memory),
            "estimated": self.target.estimated,
            "versions": versions(),
            "fits": self.fits,
            "temp_bytes": step.temp_bytes,
            "compile_seconds": step.compile_seconds,
            "collective_bytes": sum(sent.bytes for sent in step.collectives),
            "all_to_all_hidden_fraction": hidden_fraction(step, "all-to-all"),
            "programs": [_as_json(one, self.target) for one in self.programs],
        }


def preflight(config: Config, topology: str) -> Preflight:
    """Compiles the programs of a training run. Raises UserError where the topology is unknown or
    the run cannot be on it.
    """
    target = find_target(topology)
    with compiling_for(target.devices[0]):
        program = training_program(config, target)
    planned = training_programs(config, program)
    return Preflight(target, list(compile_all(planned, target, program.mesh)))


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


def _as_json(program: Measured, target: Target) -> dict[str, Any]:
    entry = dataclasses.asdict(program)
    entry["fits"] = program.fits(target.chip.memory)
    entry["collectives"] = [sent._asdict() for sent in program.collectives]
    return entry
