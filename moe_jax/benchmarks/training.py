"""Timed runs of whole training steps, of one layer, and of the compiler: what
`scripts/benchmark.py` prints.

`args` are that script's options. Each measurement returns its figures by name; docs/benchmarks.md
explains them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.benchmarks import against, program_flops
from moe_jax.benchmarks.layer import make_layer
from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.config.schema import Config, MeshConfig, OptimizerConfig, TrainConfig
from moe_jax.errors import UserError
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous
from moe_jax.profiling import flops as measure
from moe_jax.profiling import hlo, machine, memory
from moe_jax.runtime.devices import start_devices
from moe_jax.runtime.platform import default_platform
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram

BATCHES = 4  # different batches that the steps go through in turn
# those of Qwen3-30B-A3B, and of a size that a laptop's processor does in a second
LAYER_DEFAULTS = {
    True: {
        "width": 2048,
        "experts": 128,
        "expert_hidden": 768,
        "top_k": 8,
        "tokens": 16_384,
        "dtype": "bfloat16",
    },
    False: {
        "width": 512,
        "experts": 32,
        "expert_hidden": 384,
        "top_k": 4,
        "tokens": 2048,
        "dtype": "float32",
    },
}
Results = dict[str, Any]


def start_benchmark_devices(args: argparse.Namespace) -> MeshConfig:
    """Simulates devices as asked, or as the mesh needs where the CPU is all there is."""
    mesh = MeshConfig(data=args.data, expert=args.expert, tensor=args.tensor)
    start_devices(mesh, args.simulate)
    if args.simulate is None:
        args.simulate = mesh.size if default_platform().simulated else 0
    return mesh


def experts_config(args: argparse.Namespace, **changes: Any) -> MoEConfig:
    """The experts that the options ask for."""
    options = {
        "capacity_factor": args.capacity_factor,
        "dropless": args.dropless,
        "grouped_matmul": args.grouped_matmul,
        **changes,
    }
    return MoEConfig(
        num_experts=args.experts, top_k=args.top_k, hidden=args.expert_hidden, **options
    )


def build(
    args: argparse.Namespace,
    mesh: MeshConfig,
    *,
    layers: int | None = None,
    redundant_slots: int = 0,
    learning_rate: float = 3e-4,
    **experts: Any,
) -> TrainProgram:
    """The training program that the options ask for, on `mesh`, with another depth if given;
    `experts` are settings of the `moe` section.
    """
    model = ModelConfig(
        num_layers=layers or args.layers,
        width=args.width,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        tied_embeddings=not args.untied,
        compute_dtype=args.dtype,
        remat=args.remat,
        attention=args.attention,
    )
    moe = experts_config(args, **{"bias_rate": args.bias_rate, **experts})
    train = TrainConfig(global_batch=args.batch, seq_len=args.seq, accumulation=args.accumulation)
    # Refuses what cannot be split over the mesh.
    Config(model=model, moe=moe, mesh=mesh, train=train)
    return TrainProgram(
        model,
        moe,
        OptimizerConfig(schedule="constant", warmup_steps=0, learning_rate=learning_rate),
        make_mesh(mesh),
        contiguous(count_moe_layers(model, moe), args.experts, mesh.expert, redundant_slots),
        vocab_size=args.vocab,
        steps=10_000,
        accumulation=args.accumulation,
    )


def random_batch(args: argparse.Namespace, seed: int) -> dict[str, np.ndarray]:
    """Uniform random tokens, one document per sequence."""
    return one_document(
        np.random.default_rng(seed).integers(
            0, args.vocab, (args.batch, args.seq + 1), dtype=np.int32
        )
    )


def one_document(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of whole sequences [B, S + 1], each of them one document."""
    ones = np.ones((len(tokens), tokens.shape[1] - 1), np.int32)
    positions = np.tile(np.arange(ones.shape[1], dtype=np.int32), (len(tokens), 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": positions,
        "segments": ones,
        "mask": ones.astype(np.float32),
    }


def compile_step(program: TrainProgram, args: argparse.Namespace) -> tuple[Any, float]:
    """The compiled training step and the seconds that tracing and compiling took; allocates
    nothing.
    """

    def describe(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    state = jax.tree.map(describe, program.abstract_state, program.state_shardings)
    batch = jax.tree.map(
        lambda a: describe(a, program.batch_sharding), program.shard(random_batch(args, 0))
    )
    start = time.perf_counter()
    compiled = program.train_step.lower(state, batch).compile()
    return compiled, time.perf_counter() - start


def clock(run: Callable[[], Any], args: argparse.Namespace, label: str) -> list[float]:
    """Seconds of each timed repeat, one line each."""
    times = []
    for step in range(-args.warmup, args.steps):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds = time.perf_counter() - start
        print(f"{label} {step + 1 if step >= 0 else 'warm-up'}: {seconds:.4f} s", flush=True)
        times += [seconds] if step >= 0 else []
    return times


def traffic(text: str, extra_rounds: float = 0.0) -> Results:
    """Bytes per device of the program's collectives: in all, of all-to-all, and by kind."""
    sent = [entry for entry in hlo.collectives(text) if entry.group > 1]

    def runs(entry: hlo.Collective) -> float:
        return entry.bytes * extra_rounds if entry.dynamic else entry.bytes

    return {
        "collective_bytes": round(sum(map(runs, sent))),
        "all_to_all_bytes": round(sum(runs(entry) for entry in sent if entry.op == "all-to-all")),
        "collectives": [entry._asdict() for entry in sent],
    }


def speed(times: list[float], tokens: int, flops: float, rate: float) -> Results:
    """Figures of the median repeat."""
    seconds = statistics.median(times)
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "step_seconds_min": min(times),
        "model_flops": flops,
        "mfu": flops / seconds / rate,
        "matmul_flops_per_second": rate,
    }


def drops(kept: int, dropped: int) -> Results:
    """Choices computed and dropped."""
    return {"kept": kept, "dropped": dropped, "dropped_fraction": dropped / (kept + dropped)}


def benchmark_training(args: argparse.Namespace, mesh: MeshConfig) -> Results:
    """Whole training steps; with `--against` in turns with another library."""
    library = against.Library(args, "train", mesh.size) if args.against else None
    program = build(args, mesh)
    rate, rate_text = machine.matmul_rate(args.dtype, mesh.size)
    compiled, compile_seconds = compile_step(program, args)
    flops = (
        measure.TRAINING
        * measure.model_flops(program.model, program.moe, args.vocab, args.seq)
        * (args.batch * args.seq)
    )
    steps = _Steps(args, program, compiled)
    tokens = args.batch * args.seq
    compared: Results = {}
    if library is None:
        times = steps.run()
    else:
        times = []

        def ours() -> Results:
            turn = steps.run()
            times.extend(turn)
            return {"tokens_per_second": tokens / statistics.median(turn)}

        rates = ("tokens_per_second",)
        _, compared = against.in_turns(args.turns, ours, library.turn, rates, library.name)
    layers = steps.layers
    kept, dropped = (
        int(sum(np.sum(getattr(stats, name)) for stats in layers)) for name in ("kept", "dropped")
    )
    rounds = np.array([stats.rounds for stats in layers])
    total, active = measure.parameter_counts(program.model, program.moe, args.vocab)
    least = program_flops.least_bytes(program, args.batch, args.seq)
    results = {
        **speed(times, tokens, flops, rate),
        **compared,
        "matmul": rate_text,
        **drops(kept, dropped),
        "rounds": float(rounds.mean()),
        "rounds_max": int(rounds.max()),
        "parameters_total": total,
        "parameters_active": active,
        "compile_seconds": compile_seconds,
        **memory.compiled_bytes(compiled),
        **traffic(compiled.as_text(), float(rounds.mean()) - 1),
        "least_all_to_all_bytes": least.pools + least.lookup,
        "least_all_gather_bytes": least.all_gather,
        "least_reduce_scatter_bytes": least.reduce_scatter,
        "peak_bytes": machine.peak_bytes(),
    }
    if args.against_dropless:
        results |= against_dropless(args, mesh, results["temp_bytes"])
    if args.count_flops:
        results |= count_flops(args, mesh, program, compiled, steps.state, flops)
    return results


class _Steps:
    """Training steps that follow each other over several turns."""

    def __init__(self, args: argparse.Namespace, program: TrainProgram, compiled: Any):
        self._args, self._compiled, self._done = args, compiled, 0
        self._batches = [program.shard(random_batch(args, seed)) for seed in range(BATCHES)]
        self.state: TrainState = program.init(0)
        self.layers: list[Any] = []
        """The layers' statistics of each timed step."""

    def run(self) -> list[float]:
        """Seconds of each timed step of one more turn."""
        turn: list[Any] = []

        def step() -> Any:
            batch = self._batches[self._done % BATCHES]
            self.state, stats = self._compiled(self.state, batch)
            self._done += 1
            turn.append(stats.layers)
            return stats.loss

        times = clock(step, self._args, "step")
        self.layers += turn[self._args.warmup :]
        return times


def against_dropless(args: argparse.Namespace, mesh: MeshConfig, temp_bytes: int) -> Results:
    """Temporary bytes per device of this step with a capacity and dropless."""
    other, _ = compile_step(build(args, mesh, dropless=not args.dropless), args)
    pair = (memory.compiled_bytes(other)["temp_bytes"], temp_bytes)
    capacity, dropless = pair if args.dropless else pair[::-1]
    return {
        "temp_bytes_capacity": capacity,
        "temp_bytes_dropless": dropless,
        "dropless_over_capacity": dropless / capacity,
    }


def count_flops(
    args: argparse.Namespace,
    mesh: MeshConfig,
    program: TrainProgram,
    compiled: Any,
    state: Any,
    flops: float,
) -> Results:
    """FLOPs that the program spends, and those that one device with the same batch would spend in
    its place.
    """

    def count(
        program: TrainProgram, compiled: Any, state: Any, mesh: MeshConfig
    ) -> program_flops.ProgramFlops:
        sizes = program_flops.group_sizes(program, state, program.shard(random_batch(args, 0)))
        return program_flops.program_flops(
            compiled.as_text(), mesh.size, args.width, args.expert_hidden // mesh.tensor, sizes
        )

    spent = count(program, compiled, state, mesh)
    results: Results = {
        "program_flops": spent.total,
        "program_flops_padding": spent.padding,
        "program_over_model_flops": spent.total / flops,
        "uncounted_operations": hlo.uncounted(compiled.as_text()),
    }
    if mesh.size == 1:
        return results
    single = build(args, MeshConfig())
    alone = count(single, compile_step(single, args)[0], single.init(0), MeshConfig())
    unpadded = (spent.total - spent.padding) / (alone.total - alone.padding)
    return results | {
        "one_device_flops": alone.total,
        "one_device_flops_padding": alone.padding,
        "program_over_one_device": spent.total / alone.total,
        "program_over_one_device_unpadded": unpadded,
    }


def benchmark_layer(args: argparse.Namespace, mesh: MeshConfig) -> Results:
    """One MoE layer, forward and forward with backward, on random inputs with a fresh router."""
    for name, value in LAYER_DEFAULTS[not default_platform().simulated].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.tokens % (args.data * args.expert):
        raise UserError(
            f"--tokens {args.tokens} is not divisible by --data x --expert = "
            f"{args.data * args.expert}: use a multiple."
        )
    single = make_layer(
        experts_config(args),
        args.width,
        args.tokens,
        args.dtype,
        make_mesh(mesh),
        f32_weights=args.f32_weights,
    )
    rate, rate_text = machine.matmul_rate(args.dtype, mesh.size)
    start = time.perf_counter()
    forward = single.forward.lower(single.params, single.x_BSD).compile()
    both = single.backward.lower(single.params, single.x_BSD, single.dy_BSD).compile()
    compile_seconds = time.perf_counter() - start
    flops = 2 * args.tokens * args.width * (args.experts + 3 * args.top_k * args.expert_hidden)
    ahead = clock(lambda: forward(single.params, single.x_BSD), args, "forward")
    whole = clock(
        lambda: both(single.params, single.x_BSD, single.dy_BSD), args, "forward and backward"
    )
    stats = forward(single.params, single.x_BSD)[1]
    return {
        **speed(whole, args.tokens, measure.TRAINING * flops, rate),
        "forward_seconds": statistics.median(ahead),
        "mfu_forward": flops / statistics.median(ahead) / rate,
        "matmul": rate_text,
        **drops(int(stats.kept), int(stats.dropped)),
        "rounds": int(stats.rounds),
        "compile_seconds": compile_seconds,
        **memory.compiled_bytes(both),
        **traffic(both.as_text(), int(stats.rounds) - 1),
        "peak_bytes": machine.peak_bytes(),
    }


def benchmark_compile(args: argparse.Namespace, mesh: MeshConfig) -> Results:
    """Compile time of two depths; a first, small compilation takes what only the first one pays."""
    jax.jit(jnp.matmul).lower(jnp.ones((8, 8)), jnp.ones((8, 8))).compile()
    results: Results = {}
    for depth in args.depths:
        compiled, seconds = compile_step(build(args, mesh, layers=depth), args)
        results |= {
            f"compile_seconds_{depth}": seconds,
            f"temp_bytes_{depth}": memory.compiled_bytes(compiled)["temp_bytes"],
        }
        print(f"{depth} layers: {seconds:.2f} s", flush=True)
    shallow, deep = (results[f"compile_seconds_{depth}"] for depth in args.depths)
    return results | {"compile_ratio": deep / shallow}
