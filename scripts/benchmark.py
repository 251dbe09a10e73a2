"""Measures speed and memory: python scripts/benchmark.py WHAT, with one of these.

    train --data 2 --expert 4 --batch 8 --seq 256    whole training steps, 8 simulated devices
    train --batch 4 --seq 256                        the same model on one device
    train --batch 4 --seq 256 --against transformers side by side, in turns
    train --data 2 --expert 4 --against maxtext DIR  the same with MaxText, whose source DIR has
    layer                                            one MoE layer, forward and backward
    generate --against transformers                  prefill and decoding, side by side
    placement --expert 8                             load, drops, time around a move of experts
    compile --data 2 --expert 4 --depths 8 24        compile time against depth

Each prints a table and, with --json FILE, writes it; docs/benchmarks.md says what the figures
mean. Needs jax, flax, optax and numpy alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from moe_jax.benchmarks import against, generation, placement, training
from moe_jax.errors import UserError
from moe_jax.runtime.huge_pages import TUNABLES_VARIABLE, restart_with_huge_pages

COMMANDS = {
    "train": training.benchmark_training,
    "layer": training.benchmark_layer,
    "compile": training.benchmark_compile,
    "generate": generation.benchmark_generation,
    "placement": placement.benchmark_placement,
}


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        example = (
            f"example: python scripts/benchmark.py {name} --data 2 --expert 4 --json {name}.json"
        )
        command = commands.add_parser(
            name, epilog=example, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        shared_options(command, sized=name not in ("layer", "generate"))
        if name != "compile":
            command.add_argument("--steps", type=positive, default=5, help="timed repeats")
        if name == "generate":
            generation_options(command)
            continue
        command.add_argument(
            "--capacity-factor", type=float, default=1.25, help="rows of a pool over the even share"
        )
        command.add_argument(
            "--dropless",
            action="store_true",
            help="drop nothing: further rounds for what does not fit",
        )
        if name != "compile":
            command.add_argument("--warmup", type=positive, default=2, help="repeats before them")
        if name == "layer":
            command.add_argument("--tokens", type=positive, help="tokens over all devices")
            command.add_argument(
                "--f32-weights",
                action="store_true",
                help="hold weights in f32 and convert them in each pass",
            )
        else:
            model_options(command)
        if name == "placement":
            placement_options(command)
        if name == "train":
            against.add_options(command.add_argument, maxtext=True)
            command.add_argument(
                "--against-dropless",
                action="store_true",
                help="also compile the other of capacity and dropless: memory",
            )
            command.add_argument(
                "--count-flops",
                action="store_true",
                help="also count the FLOPs that this program and one device's spend",
            )
        if name == "compile":
            command.add_argument(
                "--depths",
                type=positive,
                nargs=2,
                default=[8, 24],
                help="numbers of layers to compile",
            )
    return parser.parse_args(argv)


def shared_options(command: argparse.ArgumentParser, sized: bool) -> None:
    """Options of every command; with `sized` the experts' sizes have defaults, otherwise they
    depend on the platform.
    """
    add = command.add_argument
    for axis in ("data", "expert", "tensor"):
        add(f"--{axis}", type=positive, default=1, help=f"devices on the {axis} axis of the mesh")
    add(
        "--simulate",
        type=positive,
        help="simulated CPU devices, also where an accelerator is; on CPU as many as the mesh has",
    )
    add("--json", type=Path, help="file for the figures")
    add(
        "--grouped-matmul",
        default="auto",
        choices=("auto", "reference", "ragged", "tiled"),
        help="back end",
    )
    add("--width", type=positive, default=512 if sized else None, help="model width")
    add("--experts", type=positive, default=32 if sized else None, help="experts a layer")
    add(
        "--expert-hidden",
        type=positive,
        default=384 if sized else None,
        help="hidden width of an expert",
    )
    add("--top-k", type=positive, default=4 if sized else None, help="experts a token")
    add(
        "--dtype",
        default="float32" if sized else None,
        choices=("float32", "bfloat16"),
        help="compute type",
    )


def model_options(command: argparse.ArgumentParser) -> None:
    """Options of the commands that build a whole model."""
    add = command.add_argument
    add("--batch", type=positive, default=8, help="sequences a step over all devices")
    add("--seq", type=positive, default=256, help="tokens a sequence")
    add("--layers", type=positive, default=8, help="layers")
    add("--heads", type=positive, default=8, help="query heads")
    add("--kv-heads", type=positive, default=4, help="key and value heads")
    add("--head-dim", type=positive, default=64, help="head width")
    add("--vocab", type=positive, default=32_000, help="vocabulary")
    add("--untied", action="store_true", help="an output head of its own")
    add("--accumulation", type=positive, default=1, help="parts that a step's batch is split into")
    add(
        "--remat",
        default="none",
        choices=("none", "dots", "full"),
        help="what the backward pass recomputes",
    )
    add(
        "--attention",
        default="auto",
        choices=("auto", "reference", "blockwise", "cudnn", "splash"),
        help="back end",
    )
    add(
        "--bias-rate",
        type=float,
        default=0.0,
        help="step of the balance bias: with a long --warmup load becomes even",
    )


def generation_options(command: argparse.ArgumentParser) -> None:
    """Options of `generate`; sizes that are not given depend on the platform."""
    add = command.add_argument
    for name in ("layers", "heads", "kv-heads", "head-dim", "vocab"):
        add(f"--{name}", type=positive, help=f"{name.replace('-', ' ')} of the model")
    add("--prompt", type=positive, default=1024, help="tokens to read")
    add("--generated", type=positive, default=64, help="tokens to generate")
    add("--batch", type=positive, default=1, help="rows at a time")
    add("--quantize", choices=("int8", "int4"), help="hold experts and projections in 8 or 4 bits")
    against.add_options(add, maxtext=False)


def placement_options(command: argparse.ArgumentParser) -> None:
    """Options of `placement`, and a model small enough for eight simulated devices."""
    command.add_argument(
        "--strategy", default="balanced", choices=("balanced", "topology_aware"), help="planner"
    )
    command.add_argument(
        "--redundant-slots", type=int, default=1, help="slots a device for replicas"
    )
    command.add_argument(
        "--skew", type=float, default=1.2, help="Zipf exponent of the tokens' frequencies"
    )
    command.add_argument(
        "--turns", type=positive, default=3, help="how often each table takes its turn"
    )
    command.set_defaults(
        width=128,
        expert_hidden=128,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=32,
        vocab=1024,
        batch=16,
        seq=128,
        steps=10,
    )


def readable(name: str, value: Any) -> str:
    """A figure for the table: bytes in MiB, rates with their prefix."""
    if name == "collectives":
        return (
            ", ".join(
                f"{e['op']} x{e['times']} over {e['group']}: {e['bytes'] / 2**20:.2f} MiB"
                for e in value
            )
            or "none"
        )
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if "bytes" in name:
        return f"{value / 2**20:,.2f} MiB"
    if "flops" in name and value > 1e6:
        return f"{value / 1e9:,.1f} G{'FLOP/s' if name.endswith('second') else 'FLOP'}"
    if name.startswith(("mfu", "share")) or name.endswith("fraction"):
        return f"{value:.2%}"
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a command; bad input is one sentence and exit code 2."""
    args = arguments(argv)
    try:
        if args.json and not args.json.parent.is_dir():
            raise UserError(
                f"--json {args.json}: there is no folder {args.json.parent}; create it."
            )
        mesh = training.start_benchmark_devices(args)
        figures = COMMANDS[args.command](args, mesh)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    print()
    for name, value in figures.items():
        print(f"{name:34} {readable(name, value)}")
    devices = jax.devices()[: mesh.size]
    figures |= {
        "mesh": {"data": mesh.data, "expert": mesh.expert, "tensor": mesh.tensor},
        "devices": [f"{device.platform} {device.device_kind}" for device in devices],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        },
        "environment": {
            name: os.environ.get(name) for name in (TUNABLES_VARIABLE, "NPROC", "XLA_FLAGS")
        },
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
        },
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
