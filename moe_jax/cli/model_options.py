"""Which model a command runs and on what: the values of --model, --mesh, --dtype, --quantize,
--memory and --simulate.

What can be checked without JAX is checked when a `ModelChoice` is made, so that mistakes answer at
once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.model_io.source import DTYPES, HUB_NAME, check_step, is_run
from moe_jax.runtime.compile_cache import use_compile_cache
from moe_jax.runtime.devices import start_devices
from moe_jax.utils.units import parse_bytes

if TYPE_CHECKING:
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.inference.load import LoadedModel

QUANTIZED = ("int8", "int4")


def parse_mesh(text: str) -> MeshConfig:
    """A mesh from `expert=4,tensor=2`; axes left out are 1. Raises UserError for anything else."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(data|expert|tensor)\s*=\s*(\d{1,6})\s*", part)
        if not found or found[1] in axes:
            raise UserError(
                f"--mesh {text!r} cannot be read at {part!r}: write axes as expert=4,tensor=2 "
                f"(there are data, expert, tensor)."
            )
        axes[found[1]] = int(found[2])
    return MeshConfig(**axes)


def one_of(option: str, value: str | None, values: tuple[str, ...]) -> None:
    """Raises UserError where an option has a value that is not among `values`."""
    if value is not None and value not in values:
        raise UserError(f"{option} {value!r} is unknown: choose {' or '.join(values)}.")


class Opened(NamedTuple):
    """A model in memory."""

    model: LoadedModel
    seconds: float
    """What loading took, without compiling."""
    compile_seconds: float


@dataclass(frozen=True)
class ModelChoice:
    """What a person asked for. Raises UserError where it cannot be."""

    path: Path
    """A folder, or the name of a model on the hub."""
    mesh: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    memory: str | None = None
    simulate: int | None = None
    step: int | None = None
    fallback: bool = False
    group: int = 64
    expert_cache: int | None = None

    def __post_init__(self) -> None:
        one_of("--dtype", self.dtype, DTYPES)
        one_of("--quantize", self.quantize, QUANTIZED)
        mesh = self.mesh_config
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.simulate is not None and self.simulate < mesh.size:
            raise UserError(
                f"--simulate {self.simulate} is less than the {mesh.size} devices of --mesh "
                f"{self.mesh}: raise it."
            )
        if not self.path.exists() and not re.fullmatch(HUB_NAME, str(self.path)):
            raise UserError(
                f"--model {self.path} does not exist: give a Hugging Face folder, a run directory "
                f"or a converted folder."
            )
        check_step(self.path, self.step, self.fallback)

    @property
    def mesh_config(self) -> MeshConfig:
        """The mesh; without --mesh one device."""
        return MeshConfig() if self.mesh is None else parse_mesh(self.mesh)

    @property
    def is_run(self) -> bool:
        """Whether it is a directory that `moe-jax train` wrote."""
        return is_run(self.path)

    def open(self, check: Callable[[Tokenizer, int], None] | None = None) -> Opened:
        """Starts the devices and loads the model; `check(tokenizer, context)` may refuse before
        weights are read.
        """
        use_compile_cache()
        start_devices(self.mesh_config, self.simulate)
        from moe_jax.inference.load import open_model
        from moe_jax.profiling.clock import Stopwatch

        with Stopwatch() as watch:
            loaded = open_model(
                self.path,
                mesh=self.mesh_config,
                dtype=self.dtype,
                quantize=self.quantize,
                memory=None if self.memory is None else parse_bytes(self.memory),
                step=self.step,
                fallback=self.fallback,
                group=self.group,
                expert_cache=self.expert_cache,
                check=check,
            )
        return Opened(loaded, watch.seconds, watch.compiling)
