"""What a Metal plug-in lacks to run this package's programs, seen from a machine without a Mac.

    python scripts/portability.py --target jax-mps
    python scripts/portability.py --target metaljax --json >report.json
    python scripts/portability.py --target jax-mps --only qwen3_moe-plain/int4

Every program is lowered for the plug-in's platform as the package builds it there, written as the
portable artifact that the plug-in would be sent, and compared with the tables of scripts/plugins/
(moe_jax/profiling/portable.py says how). The programs are those of inference (prefill, decoding, a
later chunk of a prompt), sampling and training, for the small configurations of tests/hf/cases,
which has every family, in each way of holding weights. The exit code is 1 where something is
missing or a layer of a decoding step exceeds its budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
from jax.extend.backend import register_backend_factory

from moe_jax import hf
from moe_jax.config.schema import MeshConfig, OptimizerConfig
from moe_jax.generation.sampling import Filters, RowState, draw_program, row_options
from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.inference.engine import ResidentEngine
from moe_jax.models.batch import Batch
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.moe.tables import make_tables
from moe_jax.ops.quantized import Kind
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous
from moe_jax.profiling.portable import (
    PluginTable,
    as_sent,
    count_ops,
    lower_for,
    missing,
    read_plugin_table,
    relied_on_drops,
)
from moe_jax.runtime.metal import METAL_ON_CPU
from moe_jax.runtime.platform import stand_in
from moe_jax.training.step import TrainProgram
from moe_jax.utils.progress import say

TABLES = ROOT / "scripts" / "plugins"
CASES = ROOT / "tests" / "hf" / "cases"
TARGETS = ("jax-mps", "metaljax", "jax-metal")
HELD: dict[str, tuple[str, Kind]] = {
    "float32": ("float32", "float"),
    "bfloat16": ("bfloat16", "float"),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
"""Ways of holding weights: the dtype, and the quantisation."""
GROUP = 4  # inputs that share a scale with int4: divides the widths of all small configurations
PROMPT, CHUNK, PLACES, VOCABULARY = 16, 32, 256, 128
BUDGET = 750
"""Operations of StableHLO in a layer of a decoding step: each may be a launch of a kernel."""
BATCH = (*[((2, 32), jnp.int32)] * 4, ((2, 32), jnp.float32), ((2,), jnp.int32))
"""Shapes and types of a training batch, in its order."""
SPEAKS_EVERY = 5.0  # seconds between remarks on progress


class Program(NamedTuple):
    """A program before it is lowered."""

    name: str
    trace: Callable[[], jax.stages.Traced]
    layers: int = 0  # whose operations are counted: those of a decoding step


class Finding(NamedTuple):
    """What came of a program."""

    name: str
    missing: list[str]
    ops: int  # operations that one run starts
    ops_per_layer: int | None  # of a decoding step


def main() -> None:
    """Reads the command line, compares, and ends with 1 where something is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--only", default="", help="programs whose name contains this")
    options = parser.parse_args()
    tables = tables_of(options.target)
    use(tables[0])
    chosen = [program for program in programs() if options.only in program.name]
    if not chosen:
        parser.error(f"--only {options.only}: no program has this in its name.")
    findings = list(compare(chosen, tables))
    if options.json:
        print(json.dumps(report(tables, findings), indent=1))
    else:
        print(text_of(tables, findings))
    sys.exit(int(any(finding.missing for finding in findings)))


def tables_of(target: str) -> list[PluginTable]:
    """The releases of a plug-in that take this jax; all, where none does."""
    found = [read_plugin_table(path) for path in sorted(TABLES.glob(f"{target}-[0-9]*.json"))]
    fitting = [table for table in found if table.takes(jax.__version__)]
    if not fitting:
        wanted = ", ".join(f"{table.name} asks for jax {table.jax}" for table in found)
        say(f"{wanted} and this is {jax.__version__}: its programs may differ from those there.")
    return fitting or found


def use(table: PluginTable) -> None:
    """Lets JAX lower for a plug-in whose back end is not here, as it does where that is, and this
    package take the CPU for Metal.
    """
    register_backend_factory(table.platform, _absent, priority=-1000)
    jax.config.update("jax_use_shardy_partitioner", table.shardy)
    stand_in(METAL_ON_CPU)


def _absent() -> Any:
    raise RuntimeError("a stand-in to lower for: it runs nothing")


def compare(chosen: list[Program], tables: list[PluginTable]) -> Iterator[Finding]:
    """Each program against all tables; says how far it is."""
    start = spoke = time.monotonic()
    for number, program in enumerate(chosen):
        yield examine(program, tables)
        now = time.monotonic()
        if now - spoke > SPEAKS_EVERY:
            spoke, done = now, number + 1
            left = (now - start) / done * (len(chosen) - done)
            say(f"{done} of {len(chosen)} programs, about {left:.0f} s left")


def examine(program: Program, tables: list[PluginTable]) -> Finding:
    """Lowers a program once and compares it with each release."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        traced = program.trace()
        lowered = lower_for(traced, tables[0].platform)
    lacks = {line for table in tables for line in relied_on_drops(traced, table)}
    total, per_layer = 0, None
    for table in tables:
        try:
            sent = as_sent(lowered, table)
        except ValueError as error:
            lacks.add(str(error).partition("\n")[0])
            continue
        lacks.update(missing(sent, table))
        total, in_layers = count_ops(sent)
        per_layer = round(in_layers / program.layers) if program.layers else None
    if per_layer is not None and per_layer > BUDGET:
        lacks.add(f"{per_layer} operations per layer, more than {BUDGET}")
    return Finding(program.name, sorted(lacks), total, per_layer)


def programs() -> list[Program]:
    """All programs: inference, sampling, training."""
    cases = sorted(path.stem for path in CASES.glob("*.json"))
    families = list({case.partition("-")[0]: case for case in reversed(cases)}.values())
    found = [program for case in cases for held in HELD for program in serving(case, held)]
    found += [sampling(name, option) for name, option in SAMPLED.items()]
    return found + [training(case, dtype) for case in families for dtype in ("float32", "bfloat16")]


def serving(case: str, held: str) -> list[Program]:
    """The programs of a model in inference."""

    @cache
    def engine() -> ResidentEngine:
        model, moe, placement = read_case(case)
        dtype, kind = HELD[held]
        plan = ServingPlan(
            model,
            moe,
            _mesh(),
            placement,
            vocab_size=model.vocab_size,
            dtype=dtype,
            quantization=kind,
            group=GROUP,
            cuts_banks=True,
        )
        tables = jax.eval_shape(lambda: make_tables(placement)[0])
        return ResidentEngine(plan, plan.abstract_params(), tables)

    layers = read_case(case)[0].num_layers
    name = f"{case}/{held}"
    found = [
        Program(f"{name}/prefill", lambda: engine().trace_prefill(1, PROMPT, PLACES)),
        Program(f"{name}/decode", lambda: engine().trace_decode(1, PLACES), layers),
    ]
    if held == "bfloat16":  # its attention is that of all others, its products those of prefill
        found.append(Program(f"{name}/chunk", lambda: engine().trace_decode(1, PLACES, CHUNK)))
    return found


SAMPLED = {
    "greedy": SamplingOptions(temperature=0.0),
    "plain": SamplingOptions(temperature=0.8),
    "filtered": SamplingOptions(
        temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2
    ),
}


def sampling(name: str, option: SamplingOptions) -> Program:
    """The program that draws a row's next token."""

    def trace() -> jax.stages.Traced:
        filters = Filters(
            draws=option.temperature > 0,
            top_k=option.top_k is not None,
            top_p=option.top_p is not None,
            min_p=option.min_p is not None,
            penalty=option.repetition_penalty != 1,
        )
        occurred = jnp.zeros((1, VOCABULARY), bool) if filters.penalty else None
        state = RowState(jnp.zeros(1, jnp.int32), occurred)
        logits_BV = jnp.zeros((1, VOCABULARY), jnp.float32)
        draw = draw_program(logits_BV.sharding)
        return draw.trace(filters, None, logits_BV, row_options([option]), state)

    return Program(f"sampling/{name}", trace)


def training(case: str, dtype: str) -> Program:
    """A model's training step."""

    def trace() -> jax.stages.Traced:
        model, moe, placement = read_case(case)
        program = TrainProgram(
            dataclasses.replace(model, compute_dtype=dtype),
            moe,
            OptimizerConfig(),
            _mesh(),
            placement,
            vocab_size=model.vocab_size,
            steps=10,
        )
        state = jax.tree.map(_placed, program.abstract_state, program.state_shardings)
        rows = jax.eval_shape(lambda: Batch(*(jnp.zeros(*array) for array in BATCH)))
        batch = jax.tree.map(lambda a: _placed(a, program.batch_sharding), rows)
        return program.train_step.trace(state, batch)

    return Program(f"{case}/{dtype}/train", trace)


@cache
def read_case(case: str) -> tuple[Any, Any, Any]:
    """A small configuration: the model, its experts, and where they lie on one device."""
    config = json.loads((CASES / f"{case}.json").read_text(encoding="utf-8"))["config"]
    _, model, moe = hf.config.map_config(config, case)
    return model, moe, contiguous(count_moe_layers(model, moe), moe.num_experts, 1)


@cache
def _mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def _placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def report(tables: list[PluginTable], findings: list[Finding]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "releases": [table.name for table in tables],
        "platform": tables[0].platform,
        "jax": jax.__version__,
        "budget_per_layer": BUDGET,
        "programs": [finding._asdict() for finding in findings],
    }


def text_of(tables: list[PluginTable], findings: list[Finding]) -> str:
    """The report as a person reads it: what is missing, in how many programs, and where first."""
    names = ", ".join(table.name for table in tables)
    lacking = [finding for finding in findings if finding.missing]
    lines = [f"{len(findings)} programs for {names} (platform {tables[0].platform})"]
    counts = Counter(lack for finding in findings for lack in finding.missing)
    for lack, count in counts.most_common():
        first = next(finding.name for finding in findings if lack in finding.missing)
        lines.append(f"  {count:4}  {lack}   first in {first}")
    lines.append(f"{len(findings) - len(lacking)} can run; {len(lacking)} lack something.")
    most = {
        held: max(
            (f.ops_per_layer or 0 for f in findings if f"/{held}/" in f.name),
            default=0,
        )
        for held in HELD
    }
    if any(most.values()):
        each = ", ".join(f"{held} {count}" for held, count in most.items() if count)
        lines.append(f"Operations per layer of a decoding step, at most {BUDGET}: {each}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
