"""The programs of a model in inference, before they are compiled: a prefill and a decoding step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.inference.engine import ResidentEngine
from moe_jax.inference.inspect import described_plan
from moe_jax.inference.kv_cache import places_for
from moe_jax.model_io.source import INT4_GROUP, find
from moe_jax.moe.tables import make_tables
from moe_jax.ops.quantized import Kind
from moe_jax.parallel.mesh import make_mesh
from moe_jax.preflight.chips import Target
from moe_jax.preflight.programs import Planned
from moe_jax.profiling.flops import model_flops
from moe_jax.profiling.memory import per_device

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Serving:
    """A model as it is to be served."""

    model: Path  # a folder, a run, a configuration, or a name on the hub
    rows: int = 8  # sequences of a decoding step
    context: int | None = None  # tokens of each; by default the model's own
    prompt: int | None = None  # tokens of a prefill; by default the context
    mesh: MeshConfig | None = None  # by default all devices along `expert`
    quantize: Kind = "float"
    group: int = INT4_GROUP


def serving_programs(serving: Serving, target: Target) -> tuple[jax.sharding.Mesh, list[Planned]]:
    """The mesh, and what an engine compiles on it: the prefill of one row, and a decoding step of
    all. Raises UserError for a model that the mesh does not divide.
    """
    described = find(serving.model, yaml=True).describe()
    count = len(target.devices)
    axes = serving.mesh or MeshConfig(expert=count)
    if axes.size != count:
        raise UserError(
            f"--mesh {axes.axes_text or 'data=1'} is {axes.size} devices and --topology "
            f"{target.topology} has {count}: give a mesh of {count}, such as expert={count}."
        )
    if serving.rows % axes.data:
        raise UserError(
            f"--rows {serving.rows} is not divisible by data={axes.data} of the mesh: change one "
            f"of them."
        )
    model, moe, mesh = described.model, described.moe, make_mesh(axes, target.devices)
    plan = described_plan(
        described,
        mesh,
        dtype="float32" if target.chip.name == "CPU" else "bfloat16",
        quantization=serving.quantize,
        group=serving.group,
    )
    tables = jax.eval_shape(lambda: make_tables(plan.placement)[0])
    engine = ResidentEngine(plan, plan.abstract_params(), tables)
    context = serving.context or described.context
    places = places_for(context, context)
    prompt = min(serving.prompt or context, places)
    rest = engine.layout.abstract(serving.rows, places)
    alone = engine.layout.abstract(axes.data, places)
    others = _bytes(rest) - _bytes(alone)
    forward = model_flops(model, moe, described.vocab_size, context) / count
    return mesh, [
        Planned(
            PREFILL,
            lambda: engine.trace_prefill(axes.data, prompt, places).lower(),
            max(others, 0),
            forward * axes.data * prompt,
        ),
        Planned(
            DECODE,
            lambda: engine.lower_decode(serving.rows, places),
            0,
            forward * serving.rows,
        ),
    ]


def _bytes(arrays: object) -> int:
    """Bytes per device of abstract arrays with shardings."""
    return per_device(arrays, jax.tree.map(lambda array: array.sharding, arrays))
