"""How much memory well-known models take on a Mac, as the table of docs/mac.md.

    python scripts/mac_memory.py            # prints the table
    python scripts/mac_memory.py --write    # puts it into docs/mac.md

The figures are those of `moe-jax inspect`. The models are described by their config.json, written
here from tests/hf/cases and their published sizes; no weights are read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax

from moe_jax import hf
from moe_jax.config.schema import MeshConfig
from moe_jax.inference.inspect import described_plan, inspect
from moe_jax.model_io.describe import Description
from moe_jax.models.weight_layout import loading_bytes
from moe_jax.parallel.mesh import make_mesh
from moe_jax.runtime.metal import gpu_share
from moe_jax.runtime.platform import standing_in
from moe_jax.utils.units import gibibytes

PAGE = ROOT / "docs" / "mac.md"
BEGIN, END = "<!-- memory: scripts/mac_memory.py --write -->", "<!-- end of memory -->"
MACS = (16, 32, 64, 128)  # GiB
CONTEXT = 4096
HELD: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": (
        "qwen3_moe-plain",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
    "gpt-oss-20b": (
        "gpt_oss-plain",
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "experts_per_token": 4,
            "vocab_size": 201088,
        },
    ),
    "OLMoE-1B-7B": (
        "olmoe-plain",
        {
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "vocab_size": 50304,
        },
    ),
}


def describe(name: str) -> Description:
    """A model by its published sizes."""
    case, sizes = SIZES[name]
    config = json.loads((ROOT / "tests" / "hf" / "cases" / f"{case}.json").read_text())["config"]
    _, model, moe = hf.config.map_config(config | sizes, name)
    vocabulary = sizes["vocab_size"]
    return Description(name, "its sizes", model, moe, vocabulary, CONTEXT, "bfloat16")


def loading_peak(described: Description, quantize: Any = "float") -> int:
    """The most memory while weights are read."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    held = {"dtype": "bfloat16", "quantization": quantize, "cuts_banks": True}
    return loading_bytes(described_plan(described, mesh, **held).weights)


def rows() -> list[str]:
    """The table's lines."""
    macs = " | ".join(f"{size} GB" for size in MACS)
    lines = [
        f"| model | held in | weights | while loading | with two caches | {macs} |",
        "|---|---|---|---|---|" + "---|" * len(MACS),
    ]
    for name in SIZES:
        described = describe(name)
        for held, options in HELD.items():
            with standing_in("metal-on-cpu"):
                found = inspect(described, dtype="bfloat16", context=CONTEXT, **options)
            weights, loading = sum(found.held_bytes.values()), loading_peak(described, **options)
            # A step's cache is there beside the one that it was given.
            running = found.total_bytes + found.cache_bytes
            cells = [name, held, *map(gibibytes, (weights, loading, running))]
            for size in MACS:
                memory = size * 2**30
                fits = running <= gpu_share(memory) and loading <= 0.9 * memory
                cells.append("yes" if fits else "-")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def page() -> str:
    """docs/mac.md with the table as it is now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return "\n".join([f"{before}{BEGIN}", "", *rows(), "", END]) + rest.partition(END)[2]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print("\n".join(rows()))
