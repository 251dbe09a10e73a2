"""Counts against hand arithmetic and real programs, and the benchmark script as a whole."""

from __future__ import annotations

import json
import math
import subprocess
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.benchmarks import program_flops
from moe_jax.config.model import LatentConfig, ModelConfig, MoEConfig
from moe_jax.config.schema import MeshConfig, OptimizerConfig
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.moe.dispatch import pool_capacity
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous
from moe_jax.profiling import flops, hlo, machine, memory
from moe_jax.training.step import TrainProgram
from tests.support import ROOT
from tests.support.command import run_module

BENCHMARK_MODEL = ModelConfig(num_layers=8, width=512, num_heads=8, num_kv_heads=4, head_dim=64)
BENCHMARK_MOE = MoEConfig(num_experts=32, top_k=4, hidden=384)
LATENT = {
    "num_kv_heads": 4,
    "qk_norm": False,
    "latent": LatentConfig(kv_rank=16, q_rank=24, rope_width=8, value_width=24),
}
TINY = {"num_layers": 3, "width": 64, "num_heads": 4, "num_kv_heads": 2}
SCRIPT = ROOT / "scripts" / "benchmark.py"


def make_program(model: ModelConfig, moe: MoEConfig, **mesh: int) -> TrainProgram:
    axes = MeshConfig(**mesh)
    placement = contiguous(count_moe_layers(model, moe), moe.num_experts, axes.expert)
    return TrainProgram(
        model, moe, OptimizerConfig(), make_mesh(axes), placement, vocab_size=96, steps=10
    )


def batch(rows: int, length: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 96, (rows, length)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return {
        "tokens": tokens,
        "targets": tokens,
        "positions": positions,
        "segments": ones,
        "mask": ones.astype(np.float32),
    }


class Compiled(NamedTuple):
    program: TrainProgram
    text: str
    group_sizes: list[int]
    memory: dict[str, int]
    kept: int
    dropped: int


@pytest.fixture(scope="module")
def step_2x4() -> Compiled:
    """A step of 8 x 32 tokens on a 2x4 mesh, with few enough rows in a pool that some are
    dropped.
    """
    program = make_program(
        ModelConfig(**TINY),
        MoEConfig(num_experts=8, top_k=2, hidden=32, capacity_factor=0.75),
        data=2,
        expert=4,
    )
    state, rows = program.init(0), program.shard(batch(8, 32))
    compiled = program.train_step.lower(state, rows).compile()
    sizes = program_flops.group_sizes(program, state, rows)
    layers = compiled(state, rows)[1].layers
    return Compiled(
        program,
        compiled.as_text(),
        sizes,
        memory.compiled_bytes(compiled),
        int(layers.kept.sum()),
        int(layers.dropped.sum()),
    )


# Counts from shapes.


def test_the_benchmark_shape_has_174_and_42_million_parameters():
    total, active = flops.parameter_counts(BENCHMARK_MODEL, BENCHMARK_MOE, 32_000)
    assert (round(total / 1e6), round(active / 1e6)) == (174, 42)
    assert total - active == 8 * 28 * 3 * 512 * 384


@pytest.mark.parametrize(
    ("model", "moe"),
    [
        ({}, {}),
        ({"tied_embeddings": False, "qk_norm": False}, {"first_dense": 1}),
        ({"head_dim": 32}, {"shared_experts": 2, "shared_gate": True, "every": 2}),
        ({"num_kv_heads": 4}, {"dense_layers": (0, 1, 2)}),
        (
            {"qkv_bias": True, "out_bias": True, "sinks": True},
            {"router_bias": True, "expert_bias": True},
        ),
        (
            {"qk_norm_over": "width", "mlp_bias": True},
            {"first_dense": 1, "shared_experts": 1, "shared_hidden": 48},
        ),
        (LATENT, {"first_dense": 1, "shared_experts": 2}),
        (
            LATENT
            | {"latent": LatentConfig(kv_rank=16, rope_width=8, value_width=24), "qkv_bias": True},
            {},
        ),
    ],
)
def test_parameter_counts_equal_those_of_a_program(model, moe):
    model, moe = (
        ModelConfig(**{**TINY, **model}),
        MoEConfig(num_experts=8, top_k=2, hidden=32, **moe),
    )
    program = make_program(model, moe, data=2, expert=4)
    total, active = flops.parameter_counts(model, moe, 96)
    assert total == sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params))
    assert total - active == count_moe_layers(model, moe) * 6 * (
        3 * 64 * 32 + moe.expert_bias * (2 * 32 + 64)
    )


def test_model_flops_by_hand():
    model = ModelConfig(num_layers=2, width=8, num_heads=2, num_kv_heads=1, head_dim=4, hidden=16)
    moe = MoEConfig(num_experts=4, top_k=2, hidden=6, shared_experts=1, first_dense=1)
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # query, key and value, out
    dense, experts = 3 * 8 * 16, 8 * 4 + (2 + 1) * 3 * 8 * 6
    scores = 2 * (2 * 8 * (1 + 2 + 3) / 3)  # two matmuls of 2 heads of 4 with 1, 2 and 3 keys
    assert (
        flops.model_flops(model, moe, 10, 3)
        == 2 * (2 * attention + dense + experts + 10 * 8) + 2 * scores
    )


def test_model_flops_of_latent_attention_by_hand():
    latent = LatentConfig(kv_rank=5, q_rank=3, rope_width=2, value_width=6)
    model = ModelConfig(
        num_layers=1,
        width=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        qk_norm=False,
        qkv_bias=True,
        latent=latent,
    )
    moe = MoEConfig(num_experts=4, top_k=2, hidden=6, shared_experts=1, shared_hidden=10)
    attention = 8 * 3 + 3 * 2 * (4 + 2) + 8 * (5 + 2) + 5 * 2 * (4 + 6) + 2 * 6 * 8
    experts = 8 * 4 + 2 * 3 * 8 * 6 + 3 * 8 * 10
    scores = 2 * 2 * ((4 + 2) + 6) * (1 + 2 + 3) / 3
    assert flops.model_flops(model, moe, 10, 3) == 2 * (attention + experts + 10 * 8) + scores


def test_a_window_limits_what_is_visible():
    assert flops.mean_visible(4, None) == (1 + 2 + 3 + 4) / 4
    assert flops.mean_visible(4, 2) == (1 + 2 + 2 + 2) / 4
    windowed = ModelConfig(**{**TINY, "num_layers": 2}, sliding_window=2, window_every=2)
    full, moe = ModelConfig(**{**TINY, "num_layers": 2}), MoEConfig()
    spared = flops.model_flops(full, moe, 96, 4) - flops.model_flops(windowed, moe, 96, 4)
    assert spared == 4 * 64 * (2.5 - 1.75)  # in one of the two layers


def test_matmul_rate_names_what_it_measured():
    rate, text = machine.matmul_rate(jnp.float32, devices=8, size=64, seconds=0.01)
    assert math.isfinite(rate) and rate > 0
    assert "float32 64 x 64 x 64" in text and "machine" in text


# Counts from a compiled program's text.


def matmuls(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0] @ w.T


def test_dots_in_a_counted_loop_are_counted_as_often_as_they_run():
    text = jax.jit(matmuls).lower(jnp.ones((8, 16)), jnp.ones((16, 16))).compile().as_text()
    assert hlo.dot_flops(text) == (6 * 2 * 8 * 16 * 16, 0)


def test_dots_in_a_loop_of_unknown_length_are_set_apart():
    def repeat(n, x, w):
        return jax.lax.fori_loop(0, n, lambda _, x: matmuls(x, w), x)

    text = jax.jit(repeat).lower(3, jnp.ones((8, 16)), jnp.ones((16, 16))).compile().as_text()
    assert hlo.dot_flops(text) == (0, 6 * 2 * 8 * 16 * 16)


def test_batched_dots_and_their_gradients():

    def loss(a, b):
        return jnp.sum(jnp.einsum("bij,bjk->bik", a, b) ** 2)

    text = (
        jax.jit(jax.grad(loss, argnums=(0, 1)))
        .lower(jnp.ones((3, 16, 32)), jnp.ones((3, 32, 8)))
        .compile()
        .as_text()
    )
    assert hlo.dot_flops(text) == (3 * 2 * 3 * 16 * 32 * 8, 0)


def test_collectives_of_a_known_program():
    mesh = make_mesh(MeshConfig(data=2, expert=4))

    def local(x):  # [4, 6] on each device
        def body(x, _):
            y = jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)
            whole = jax.lax.all_gather(y, ("data", "expert"), axis=0, tiled=True)
            return jax.lax.psum_scatter(
                whole, ("data", "expert"), scatter_dimension=0, tiled=True
            ), None

        return jax.lax.psum(jax.lax.scan(body, x, None, length=3)[0], "data")

    mapped = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=P(("data", "expert")), out_specs=P("expert"))
    )
    found = {
        entry.op: entry
        for entry in hlo.collectives(mapped.lower(jnp.ones((32, 6))).compile().as_text())
    }
    array = 4 * 6 * 4
    assert found == {
        "all-to-all": hlo.Collective("all-to-all", 4, 3, 3 * array, False),
        "all-gather": hlo.Collective("all-gather", 8, 3, 3 * 8 * array, False),
        "reduce-scatter": hlo.Collective("reduce-scatter", 8, 3, 3 * 8 * array, False),
        "all-reduce": hlo.Collective("all-reduce", 2, 1, array, False),
    }


GPU_TEXT = """HloModule jit_step, num_partitions=8

%scattered (p: bf16[64,8]) -> bf16[8,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  ROOT %rs = bf16[8,8]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, \
to_apply=%add
}

ENTRY %main (a: bf16[16,8], b: bf16[8,32]) -> bf16[16,32] {
  %a = bf16[16,8]{1,0} parameter(0)
  %b = bf16[8,32]{1,0} parameter(1)
  %start = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%a), \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %done = bf16[64,8]{1,0} all-gather-done(%start)
  %begun = ((bf16[64,8]{1,0}), bf16[8,8]{1,0}) async-start(%done), calls=%scattered
  %ended = bf16[8,8]{1,0} async-done(%begun)
  %all = f32[2]{0} all-reduce(%c), replica_groups=mesh['x'=4,'y'=2] {'y'}, to_apply=%add
  %gemm = (bf16[16,32]{1,0}, s8[4096]{0}) custom-call(bf16[16,8]{1,0} %a, bf16[8,32]{1,0} %b), \
custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]}}}
  %other = bf16[4]{0} custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %out = bf16[16,32]{1,0} get-tuple-element(%gemm), index=0
}
"""


def test_asynchronous_collectives_and_library_matmuls_of_gpu_programs():
    assert hlo.collectives(GPU_TEXT) == [
        hlo.Collective("all-gather", 4, 1, 64 * 8 * 2, False),
        hlo.Collective("all-reduce", 2, 1, 8, False),
        hlo.Collective("reduce-scatter", 8, 1, 64 * 8 * 2, False),
    ]
    assert hlo.dot_flops(GPU_TEXT) == (2 * 16 * 8 * 32, 0)
    assert hlo.uncounted(GPU_TEXT) == ["__cudnn$fmhaSoftmax"]


def test_what_is_not_a_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.dot_flops("HloModule nothing")


# A whole training step.


@pytest.mark.slow
def test_all_to_all_bytes_of_a_step_are_the_pools(step_2x4):
    pool_rows = 4 * pool_capacity(32, 2, 4, 0.75)
    least = program_flops.least_bytes(step_2x4.program, 8, 32)
    sent = [entry for entry in hlo.collectives(step_2x4.text) if entry.op == "all-to-all"]
    assert [(entry.group, entry.times, entry.dynamic) for entry in sent] == [
        (4, 3 * 5, False),
        (8, 2, False),
    ]
    assert sent[1].bytes == least.lookup == 2 * 32 * 64 * 4
    assert sent[0].bytes == least.pools == 3 * (4 * pool_rows * 64 * 4 + pool_rows * 4)


def test_every_parameter_is_gathered_and_scattered_as_the_floor_says(step_2x4):
    least = program_flops.least_bytes(step_2x4.program, 8, 32)
    moved = dict.fromkeys(("all-gather", "reduce-scatter"), 0)
    for entry in hlo.collectives(step_2x4.text):
        if entry.op in moved:
            moved[entry.op] += entry.bytes
    assert moved["reduce-scatter"] == least.reduce_scatter
    assert least.all_gather <= moved["all-gather"] <= 2 * least.all_gather


def test_a_step_of_8_devices_computes_no_expert_twice(step_2x4):
    assert step_2x4.dropped > 0
    assert (
        sum(step_2x4.group_sizes) == 2 * step_2x4.kept
    )  # each group is reported for both of its matmuls
    spent = program_flops.program_flops(step_2x4.text, 8, 64, 32, step_2x4.group_sizes)
    assert spent.experts == 3 * step_2x4.kept * 2 * 3 * 64 * 32
    model, moe = step_2x4.program.model, step_2x4.program.moe
    tokens, layers = 8 * 32, model.num_layers
    experts = layers * moe.top_k * 2 * 3 * 64 * 32
    scores = layers * 2 * 2 * 64 * flops.mean_visible(32, None)
    dense = flops.model_flops(model, moe, 96, 32) - experts - scores
    # One block covers all 32 keys of a query, and the backward pass computes its scores again: 2 +
    # 5 matmuls of full length. The router's weights combine rows in a matmul too, forward and for
    # their gradient.
    attention = layers * 7 * 2 * 64 * 32
    combine = layers * 2 * 2 * moe.top_k * 64
    assert spent.counted == pytest.approx(tokens * (3 * dense + attention + combine), rel=0.02)


def test_memory_and_peak(step_2x4):
    state = step_2x4.program.abstract_state
    held = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.opt_state))
    )
    assert held / 8 < step_2x4.memory["argument_bytes"] < held / 8 * 1.2 + 8192
    assert step_2x4.memory["temp_bytes"] > 0
    assert machine.peak_bytes() > 50e6


# The script.

NEVER_IMPORTED = (
    "pydantic",
    "grain",
    "typer",
    "tokenizers",
    "transformers",
    "matplotlib",
    "jaxtyping",
)
REQUIRED = (
    *(
        "tokens_per_second",
        "step_seconds",
        "mfu",
        "matmul_flops_per_second",
        "dropped_fraction",
        "collective_bytes",
        "peak_bytes",
    ),
    *(
        "compile_seconds",
        "model_flops",
        "parameters_total",
        "parameters_active",
        "temp_bytes",
        "argument_bytes",
        "all_to_all_bytes",
    ),
    *(
        "least_all_to_all_bytes",
        "kept",
        "dropped",
        "rounds",
        "versions",
        "devices",
        "mesh",
        "options",
    ),
)
SIZES = {
    "width": 32,
    "layers": 2,
    "heads": 2,
    "kv-heads": 1,
    "head-dim": 16,
    "vocab": 64,
    "experts": 4,
    "top-k": 2,
    "expert-hidden": 16,
}
SIZES |= {"data": 2, "expert": 2, "batch": 4, "seq": 16, "steps": 2, "warmup": 1}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    """The script in a Python that has none of the packages it must do without."""
    return run_module("without_packages", ",".join(NEVER_IMPORTED), "run", SCRIPT, *options)


@pytest.mark.slow
def test_the_script_writes_every_figure(tmp_path):
    done = run_script("train", *SMALL, "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    assert "step 2: " in done.stdout and "mfu" in done.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert set(REQUIRED) <= set(figures)
    assert (
        figures["kept"] + figures["dropped"] == 2 * 4 * 16 * 2 * 2
    )  # steps, sequences, tokens, choices, layers
    assert figures["dropped_fraction"] == figures["dropped"] / (
        figures["kept"] + figures["dropped"]
    )
    assert figures["all_to_all_bytes"] == figures["least_all_to_all_bytes"] > 0
    assert figures["tokens_per_second"] == pytest.approx(64 / figures["step_seconds"])
    assert figures["mfu"] == pytest.approx(
        figures["model_flops"] / figures["step_seconds"] / figures["matmul_flops_per_second"]
    )
    assert figures["mesh"] == {"data": 2, "expert": 2, "tensor": 1}


@pytest.mark.slow
def test_the_script_refuses_what_does_not_fit_in_one_sentence(tmp_path):
    done = run_script("train", *SMALL, "--top-k", "5")
    assert done.returncode == 2 and "moe.top_k=5" in done.stderr and "Traceback" not in done.stderr
    done = run_script("layer", "--json", str(tmp_path / "none" / "out.json"))
    assert done.returncode == 2 and "no folder" in done.stderr
