"""Which model a command runs and on what: MODEL, --mesh, --dtype, --quantize, --memory and the
rest.

What can be checked without JAX is checked when these are made, so that mistakes answer at once.
Commands open a model through `load_model` alone: a test that puts a function of its own in its
place (`moe_jax.cli.inference.load_model`) runs them without an engine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moe_jax.cli.options import (
    Context,
    Dtype,
    ExpertCacheSize,
    Fallback,
    Group,
    Memory,
    Mesh,
    Quantize,
    Simulate,
    Step,
)
from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.model_io.source import DTYPES, INT4_GROUP, QUANTIZED, check_step, is_run
from moe_jax.runtime.devices import start_devices
from moe_jax.utils.files import is_hub_name
from moe_jax.utils.units import parse_bytes

if TYPE_CHECKING:
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.inference.load import LoadedModel
    from moe_jax.models.serving_plan import ServingPlan


def parse_mesh(text: str) -> MeshConfig:
    """A mesh from `expert=4,tensor=2`; axes left out are 1. Raises UserError for anything else."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        axis = re.fullmatch(r"\s*(data|expert|tensor)\s*=\s*(\d{1,6})\s*", part)
        if axis and axis[1] in axes:
            raise UserError(f"--mesh {text!r} has {axis[1]} twice: give each axis once.")
        if not axis:
            raise UserError(
                f"--mesh {text!r} cannot be read at {part!r}: write axes as expert=4,tensor=2 "
                f"(there are data, expert, tensor)."
            )
        axes[axis[1]] = int(axis[2])
        if not axes[axis[1]]:
            raise UserError(f"--mesh {text}: {axis[0].strip()} must be 1 or more.")
    return MeshConfig(**axes)


def one_of(option: str, value: str | None, values: tuple[str, ...]) -> None:
    """Raises UserError where an option has a value that is not among `values`."""
    if value is not None and value not in values:
        raise UserError(f"{option} {value!r} is unknown: choose {' or '.join(values)}.")


def check_types(dtype: str | None, quantize: str | None = None, group: int = INT4_GROUP) -> None:
    """Raises UserError for types that weights cannot have."""
    one_of("--dtype", dtype, DTYPES)
    one_of("--quantize", quantize, QUANTIZED)
    if group % 2:
        raise UserError(
            f"--group {group} is odd, and int4 keeps two values per byte: choose an even number "
            f"such as 32 or 64."
        )
    if group != INT4_GROUP and quantize != "int4":
        raise UserError(
            f"--group {group} is for --quantize int4: give that too, or leave --group out."
        )


@dataclass(frozen=True)
class ModelOptions:
    """How a model is held and on what it runs. Raises UserError for what cannot be."""

    mesh: Mesh = None
    dtype: Dtype = None
    quantize: Quantize = None
    group: Group = INT4_GROUP
    expert_cache_size: ExpertCacheSize = None
    memory: Memory = None
    context: Context = None
    simulate: Simulate = None
    step: Step = None
    fallback: Fallback = False

    def __post_init__(self) -> None:
        check_types(self.dtype, self.quantize, self.group)
        mesh = self.mesh_config
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.simulate is not None and self.simulate < mesh.size:
            raise UserError(
                f"--simulate {self.simulate} is less than the {mesh.size} devices of --mesh "
                f"{self.mesh}: raise it."
            )

    @property
    def mesh_config(self) -> MeshConfig:
        """The mesh; without --mesh one device."""
        return MeshConfig() if self.mesh is None else parse_mesh(self.mesh)


@dataclass(frozen=True)
class ModelChoice:
    """A model and its options. Raises UserError where there is no such model."""

    path: Path
    """A folder, or the name of a model on the hub."""
    options: ModelOptions = ModelOptions()

    def __post_init__(self) -> None:
        if not self.path.exists() and not is_hub_name(self.path):
            raise UserError(
                f"{self.path} does not exist: give a Hugging Face folder, a run, a converted "
                f"folder, or a model on the hub such as Qwen/Qwen3-30B-A3B."
            )
        check_step(self.path, self.options.step, self.options.fallback)

    def fingerprint(self) -> str:
        """What several processes must have in common: a line for each file of the folder, with its
        size, and that of config.json with its content; a name of the hub as it is.
        """
        if not self.path.is_dir() or self.is_run:
            return str(self.path)
        lines = [
            f"{path.name} of {path.stat().st_size} bytes"
            for path in sorted(self.path.iterdir())
            if path.is_file()
        ]
        config = self.path / "config.json"
        if config.exists():
            lines.append(f"config.json {hashlib.sha256(config.read_bytes()).hexdigest()}")
        return "\n".join(lines)

    @property
    def is_run(self) -> bool:
        """Whether it is a directory that `moe-jax train` wrote."""
        return is_run(self.path)


class Opened(NamedTuple):
    """A model in memory."""

    model: LoadedModel
    seconds: float
    """What loading took, without compiling."""
    compile_seconds: float


def load_model(
    choice: ModelChoice,
    check: Callable[[Tokenizer, int], None] | None = None,
    check_plan: Callable[[ServingPlan, int], None] | None = None,
    redundant_slots: int = 0,
) -> Opened:
    """Starts the devices and loads the model; `check(tokenizer, context)` and `check_plan(plan,
    context)` may refuse before weights are read. `redundant_slots` as those of `open_model`.
    """
    from moe_jax.inference.load import open_model
    from moe_jax.profiling.clock import Stopwatch

    options = choice.options
    start_devices(options.mesh_config, options.simulate)
    with Stopwatch() as watch:
        model = open_model(
            choice.path,
            mesh=options.mesh_config,
            dtype=options.dtype,
            quantize=options.quantize,
            memory=None if options.memory is None else parse_bytes(options.memory),
            step=options.step,
            fallback=options.fallback,
            group=options.group,
            context=options.context,
            expert_cache=options.expert_cache_size,
            redundant_slots=redundant_slots,
            check=check,
            check_plan=check_plan,
        )
    return Opened(model, watch.seconds, watch.compiling)
