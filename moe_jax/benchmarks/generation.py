"""Speed of inference on random weights, beside transformers where asked: what `scripts/benchmark.py
generate` prints.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.benchmarks import against
from moe_jax.benchmarks.against import SIZES
from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.config.schema import MeshConfig
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.generation.bench import bench
from moe_jax.inference.engine import ResidentEngine
from moe_jax.inference.read_weights import serving_tables
from moe_jax.inference.session import LoadedModel
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.paths import nested
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.sharding import named
from moe_jax.placement.table import contiguous
from moe_jax.runtime.platform import default_platform

DEFAULTS: dict[
    bool, dict[str, Any]
] = {  # layers of the sizes of Qwen3-30B-A3B, and what a laptop's processor does in milliseconds
    True: dict(zip(SIZES, (2048, 4, 32, 4, 128, 128, 768, 8, 151_936, "bfloat16"), strict=True)),
    False: dict(zip(SIZES, (512, 8, 8, 4, 64, 32, 384, 4, 32_000, "float32"), strict=True)),
}
COMPARED = ("prefill_tokens_per_second", "decode_tokens_per_second")


def random_params(plan: ServingPlan) -> Any:
    """Weights drawn on the devices that hold them, one parameter after another."""
    found = {}
    for number, (path, leaf) in enumerate(plan.weights.items()):
        key = jax.random.fold_in(jax.random.key(0), number)

        def draw(key, leaf=leaf):
            return leaf.pack(0.02 * jax.random.normal(key, leaf.ordered, jnp.float32))

        found[path] = jax.block_until_ready(
            jax.jit(draw, out_shardings=named(plan.mesh, leaf.held_spec()))(key)
        )
    return nested(found)


def load_random(args: argparse.Namespace, mesh: MeshConfig) -> LoadedModel:
    """The model that the options ask for."""
    model = ModelConfig(
        num_layers=args.layers,
        width=args.width,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        qk_norm=True,
    )
    moe = MoEConfig(
        num_experts=args.experts,
        top_k=args.top_k,
        hidden=args.expert_hidden,
        dropless=True,
        grouped_matmul=args.grouped_matmul,
    )
    placement = contiguous(count_moe_layers(model, moe), args.experts, mesh.expert)
    options = {
        "vocab_size": args.vocab,
        "dtype": args.dtype,
        "quantization": args.quantize or "float",
    }
    plan = ServingPlan(model, moe, make_mesh(mesh), placement, **options)
    return LoadedModel(
        ResidentEngine(plan, random_params(plan), serving_tables(plan, None)),
        load_tokenizer("bytes"),
        args.prompt + args.generated,
        (),
        "random weights",
    )


def benchmark_generation(args: argparse.Namespace, mesh: MeshConfig) -> dict[str, Any]:
    """Prefill and decoding, apart; with `--against transformers` in turns with it, on the same
    shape and machine.
    """
    for name, value in DEFAULTS[not default_platform().simulated].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    library = against.Library(args, "generate", mesh.size) if args.against else None
    loaded = load_random(args, mesh)
    session = loaded.session(args.batch)

    def ours() -> dict[str, Any]:
        options = {"prompt": args.prompt, "generated": args.generated, "repeats": args.steps}
        return bench(loaded, session, **options)

    compared: dict[str, Any] = {}
    if library is None:
        every = [ours()]
    else:
        every, compared = against.in_turns(args.turns, ours, library.turn, COMPARED, library.name)
    names = (*COMPARED, "share_of_floor", "decode_ms_per_step")
    figures = every[-1] | {name: statistics.median(one[name] for one in every) for name in names}
    figures.pop("model"), figures.pop("platform")
    return figures | compared
