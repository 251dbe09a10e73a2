"""Speed of inference on random weights, beside transformers where asked: what `scripts/benchmark.py
generate` prints.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.config.schema import MeshConfig
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
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

THEIRS = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_transformers.py"
SIZES = (
    "width",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "experts",
    "expert_hidden",
    "top_k",
    "vocab",
    "dtype",
)
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
    loaded = load_random(args, mesh)
    session = loaded.session(args.batch)
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for turn in range(args.turns if args.against else 1):
        ours.append(
            bench(loaded, session, prompt=args.prompt, generated=args.generated, repeats=args.steps)
        )
        print(f"turn {turn + 1}: " + _speeds(ours[-1]), flush=True)
        if args.against:
            theirs.append(_transformers(args))
            print(f"turn {turn + 1}: " + _speeds(theirs[-1]) + "  (transformers)", flush=True)
    figures = ours[-1] | {name: statistics.median(turn[name] for turn in ours) for name in COMPARED}
    figures |= {
        name: statistics.median(turn[name] for turn in ours)
        for name in ("share_of_floor", "decode_ms_per_step")
    }
    figures.pop("model"), figures.pop("platform")
    if args.against:
        for name in COMPARED:
            other = statistics.median(turn[name] for turn in theirs)
            figures |= {
                f"transformers_{name}": other,
                f"{name.split('_')[0]}_over_transformers": figures[name] / other,
            }
        figures["transformers_version"] = theirs[-1]["version"]
    return figures


def _speeds(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name.split('_')[0]} {figures[name]:,.1f} tokens/s" for name in COMPARED)


def _transformers(args: argparse.Namespace) -> dict[str, Any]:
    """The same figures of transformers, in a process of its own."""
    options = {name: getattr(args, name) for name in SIZES} | {
        "prompt": args.prompt,
        "generated": args.generated,
        "batch": args.batch,
    }
    command = [args.python, str(THEIRS), json.dumps(options | {"repeats": args.steps})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise UserError(
            f"--python {args.python} cannot run transformers ({said[-1] if said else error}): "
            f"name a Python with torch and transformers."
        ) from error
    return json.loads(done.stdout.splitlines()[-1])
