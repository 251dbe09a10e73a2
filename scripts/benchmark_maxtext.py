"""MaxText's Qwen3-MoE on random weights and synthetic tokens, in training: the other side of
`benchmark.py train --against maxtext DIR`.

Takes `train`, the options as JSON and the folder of MaxText's source, and prints the figures as
JSON. Needs what MaxText needs to train on CPU without Google's cloud (its
decoupled-requirements.txt has more than that), nothing of this project.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

# Ours, and the nearest that MaxText has.
REMAT = {"none": "minimal_with_context", "dots": "minimal", "full": "full"}


def settings(options: dict[str, Any], out: str) -> dict[str, Any]:
    """MaxText's settings for our options. Ours shards parameters over `data` and `expert`: its fsdp
    and expert. Its capacity holds for each expert, ours for each device.
    """
    devices = options["data"] * options["expert"] * options["tensor"]
    return {
        "run_name": "benchmark",
        "base_output_directory": out,
        "metrics_file": f"{out}/metrics",
        "steps": options["warmup"] + options["steps"],
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "enable_tensorboard": False,
        "enable_goodput_recording": False,
        "monitor_goodput": False,
        "dataset_type": "synthetic",
        "decoder_block": "qwen3_moe",
        "base_emb_dim": options["width"],
        "base_num_decoder_layers": options["layers"],
        "base_num_query_heads": options["heads"],
        "base_num_kv_heads": options["kv_heads"],
        "head_dim": options["head_dim"],
        "num_experts": options["experts"],
        "num_experts_per_tok": options["top_k"],
        "base_mlp_dim": options["expert_hidden"],
        "base_moe_mlp_dim": options["expert_hidden"],
        "mlp_activations": "['silu','linear']",
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "vocab_size": options["vocab"],
        "logits_via_embedding": not options["untied"],
        "normalize_embedding_logits": False,
        "enable_dropout": False,
        "attention": "dot_product",
        "dtype": options["dtype"],
        "weight_dtype": "float32",
        "remat_policy": REMAT[options["remat"]],
        "sparse_matmul": False,  # lax.ragged_dot and Megablox multiply every expert on a CPU
        "megablox": False,
        "capacity_factor": -1 if options["dropless"] else options["capacity_factor"],
        "max_target_length": options["seq"],
        "per_device_batch_size": options["batch"] / devices,
        "ici_fsdp_parallelism": options["data"],
        "ici_expert_parallelism": options["expert"],
        "ici_tensor_parallelism": options["tensor"],
        **dict(setting.split("=", 1) for setting in options["maxtext_option"] or ()),
    }


def train(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The median step of those that are timed, as MaxText writes them down."""
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"
    sys.path.insert(0, str(folder / "src"))
    import jax

    devices = options["data"] * options["expert"] * options["tensor"]
    jax.config.update("jax_num_cpu_devices", devices)
    from maxtext import __version__
    from maxtext.trainers.pre_train import train as maxtext

    with tempfile.TemporaryDirectory() as out:
        chosen = (f"{name}={value}" for name, value in settings(options, out).items())
        maxtext.main(["train", str(folder / "src/maxtext/configs/base.yml"), *chosen])
        lines = Path(out, "metrics").read_text().splitlines()
    seconds = [json.loads(line)["perf/step_time_seconds"] for line in lines]
    tokens = options["batch"] * options["seq"]
    return {
        "tokens_per_second": tokens / statistics.median(seconds[options["warmup"] :]),
        "version": f"MaxText {__version__}, jax {jax.__version__}",
    }


def main(what: str, options: str, folder: str) -> None:
    """Prints the figures."""
    figures = {"train": train}[what](json.loads(options), Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures["peak_bytes"] = peak if sys.platform == "darwin" else peak * 1024
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
