"""The memory that loading a checkpoint takes, on Linux.

    python -m tests.support.memory_peak FOLDER TENSOR QUANTIZATION

Loads FOLDER over TENSOR devices; prints, as JSON, the bytes by which the process grew at its
peak and the bytes that the weights take on devices.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import jax

from moe_jax import hf
from moe_jax.config.schema import MeshConfig
from moe_jax.inference import memory, read_weights
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous


def status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def run() -> None:
    folder, tensor, quantization = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    checkpoint = hf.open_checkpoint(Path(folder))
    config = MeshConfig(tensor=int(tensor))
    plan = ServingPlan(
        checkpoint.model,
        checkpoint.moe,
        make_mesh(config, jax.devices()[: config.size]),
        contiguous(0, checkpoint.moe.num_experts, 1),
        vocab_size=checkpoint.vocab_size,
        quantization=cast(Any, quantization),
    )
    jax.block_until_ready(jax.jit(lambda: jax.numpy.ones(3) + 1)())
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    jax.block_until_ready(read_weights.read_params(plan, checkpoint.leaf))
    held = sum(memory.device_bytes(plan).values())
    print(json.dumps({"peak": status("VmHWM") - before, "held": held}))


if __name__ == "__main__":
    run()
