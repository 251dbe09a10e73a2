"""The programs for Metal, run on the CPU: the same logits and texts as the CPU's own programs, for
every family and every way to hold its weights, and nothing in them that a plug-in for Metal lacks.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax import hf
from moe_jax.config.schema import MeshConfig
from moe_jax.generation.sampling import Sampler
from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.inference.engine import ResidentEngine
from moe_jax.inference.read_weights import read_params, serving_tables
from moe_jax.models.batch import NewTokens
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous
from moe_jax.runtime.metal import METAL_ON_CPU
from moe_jax.runtime.platform import standing_in
from tests.support import hf_cases as cases
from tests.support.slow import slow_unless

PLACES = 64
TOKENS = 12  # written
FORMATS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
    "int4": {"dtype": "float32", "quantization": "int4", "group": 4},
}
# The others share their code with it.
QUICK = {("qwen3_moe-plain", "int4")}
FAMILIES = sorted(
    {cases.family(case): case for case in sorted(cases.CASES, key=lambda c: "plain" in c)}.values()
)


def make_engine(case: str, form: str, folder: Path, *, cuts_banks: bool = False) -> ResidentEngine:
    checkpoint = hf.open_checkpoint(cases.build(case, folder))
    layers = count_moe_layers(checkpoint.model, checkpoint.moe)
    placement = contiguous(layers, checkpoint.moe.num_experts, 1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    held: dict[str, Any] = {"vocab_size": checkpoint.vocab_size, **FORMATS[form]}
    plan = ServingPlan(
        checkpoint.model, checkpoint.moe, mesh, placement, cuts_banks=cuts_banks, **held
    )
    return ResidentEngine(
        plan, read_params(plan, checkpoint.leaf), serving_tables(plan, checkpoint.bias_LE())
    )


def again(engine: ResidentEngine) -> ResidentEngine:
    """The same weights, with nothing compiled."""
    return ResidentEngine(engine.plan, engine.params, engine.tables)


def new_tokens(rows: list[list[int]], starts: list[int]) -> NewTokens:
    width = max(map(len, rows))
    tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    return NewTokens(tokens, np.array(starts, np.int32), np.array([*map(len, rows)], np.int32))


def write(engine: ResidentEngine, prompt: list[int]) -> tuple[np.ndarray, list[int]]:
    """Logits f32 [tokens, V] of a greedy text, and the text."""
    new = new_tokens([prompt], [0])
    logits, cache = engine.prefill(engine.layout.new(1, PLACES), new)
    steps, text = [np.asarray(logits)[0]], [int(np.argmax(logits))]
    while len(text) < TOKENS:
        step = new_tokens([[text[-1]]], [len(prompt) + len(text) - 1])
        logits, cache = engine.decode(cache, step)
        steps.append(np.asarray(logits)[0])
        text.append(int(np.argmax(logits)))
    return np.stack(steps), text


def pairs() -> list[tuple[str, str]]:
    """Each family in two ways of holding weights, in turn: all of them together take minutes."""
    forms = list(FORMATS)
    chosen = {(case, forms[(at + more) % 4]) for at, case in enumerate(FAMILIES) for more in (0, 2)}
    return sorted(chosen | QUICK)


@pytest.mark.parametrize(("case", "form"), slow_unless(QUICK.__contains__, pairs()))
def test_logits_and_text(case: str, form: str, tmp_path: Path) -> None:
    engine = make_engine(case, form, tmp_path)
    prompt = cases.expected(case)["prompt"].tolist()
    logits, text = write(engine, prompt)
    with standing_in(METAL_ON_CPU):
        found, written = write(make_engine(case, form, tmp_path, cuts_banks=True), prompt)
    # XLA may keep more bits than bf16 has between two operations, and the normal path gives it
    # other chances to (gpt-oss: 0.024). With --xla_allow_excess_precision=false both are equal.
    tolerance = 1e-5 if form != "bfloat16" else 0.05
    np.testing.assert_allclose(found, logits, atol=tolerance * np.abs(logits).max())
    assert written == text


@pytest.fixture(scope="module")
def metal(tmp_path_factory: pytest.TempPathFactory) -> ResidentEngine:
    folder = tmp_path_factory.mktemp("metal")
    return make_engine("qwen3_moe-plain", "int4", folder, cuts_banks=True)


@pytest.fixture(scope="module")
def compiled_once(metal: ResidentEngine) -> ResidentEngine:
    """For tests that run Metal's programs of the same shapes."""
    return again(metal)


LACKING = re.compile(
    r"all_reduce|all_gather|all_to_all|collective_permute|reduce_scatter|partition_id|replica_id|"
    r"ragged_dot|stablehlo\.case|callback|f64|f8E|i4>|tf\.aliasing_output|jax\.buffer_donor"
)


def test_decoding_has_one_loop_over_a_banks_layers_and_nothing_that_is_lacking(
    metal: ResidentEngine,
) -> None:
    with standing_in(METAL_ON_CPU):
        text = again(metal).lower_decode(1, PLACES).as_text()
    banks = [weight.parts for path, weight in metal.plan.weights.items() if "gate_up" in path]
    assert text.count("stablehlo.while") == sum(len(parts) or 1 for parts in banks)
    assert LACKING.search(text) is None
    bf16_to_f32 = r"dot_general.*\(tensor<[0-9x]*bf16>, tensor<[0-9x]*bf16>\) -> tensor<[0-9x]*f32>"
    assert not re.search(bf16_to_f32, text)
    # or the expressions would see nothing
    normal = again(metal).lower_decode(1, PLACES).as_text()
    assert normal.count("stablehlo.while") > text.count("stablehlo.while")
    assert LACKING.search(normal) is not None


def scans(jaxpr: Any) -> Iterator[Any]:
    """Every scan of a program, also inside others."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from scans(inner)


def test_choices_of_experts_are_counted_without_stacking(metal: ResidentEngine) -> None:
    """What a loop stacks may come out with parts overwritten (`Platform.stacks_in_loops`)."""
    with standing_in(METAL_ON_CPU):
        engine = again(metal)
        engine.count_choices()
        new = new_tokens([[1, 2, 3]], [0])
        given = (engine._held, engine.tables, engine.layout.new(1, PLACES), new, engine._load_LP)
        found = list(scans(engine._decode_counted.trace(*given).jaxpr))
        engine.decode(engine.layout.new(1, PLACES), new)
        counts = engine.choices()
    assert found and all(len(one.outvars) == one.params["num_carry"] for one in found)
    assert counts is not None and (counts.sum(1) == 3 * metal.plan.moe.top_k).all()


def test_a_token_takes_one_transfer_to_the_host(
    compiled_once: ResidentEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one array, the token itself; its logits stay on the device."""
    whole, fetched = jax.device_get, []
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or whole(tree))
    engine = compiled_once
    with standing_in(METAL_ON_CPU):
        sampler = Sampler([SamplingOptions(temperature=0.0)])
        logits, cache = engine.prefill(engine.layout.new(1, PLACES), new_tokens([[1, 2, 3]], [0]))
        for start in range(3, 8):
            with jax.transfer_guard_device_to_host("disallow"):  # of others; not on a CPU
                token = int(sampler.draw(logits)[0])
                logits, cache = engine.decode(cache, new_tokens([[token]], [start]))
    assert [leaf.shape for leaf in jax.tree.leaves(fetched)] == [(1,)] * 5


@pytest.mark.slow
def test_the_memory_of_decoding_does_not_grow(compiled_once: ResidentEngine) -> None:
    """Nothing is donated there: what a step was given is free after it."""
    engine = compiled_once
    with standing_in(METAL_ON_CPU):
        logits, cache = engine.prefill(engine.layout.new(1, PLACES), new_tokens([[1, 2, 3]], [0]))
        sizes = []
        for start in range(3, 23):
            logits, cache = engine.decode(cache, new_tokens([[5]], [start]))
            logits.block_until_ready()
            gc.collect()
            sizes.append(sum(array.nbytes for array in jax.live_arrays()))
    assert len(set(sizes[2:])) == 1
