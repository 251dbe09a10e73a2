"""Prefill and decoding of transformers' Qwen3-MoE on random weights: the other side of
`benchmark.py generate --against transformers`.

Takes the options as one JSON argument and prints the figures as JSON. Needs torch and transformers,
nothing of this project.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def build(options: dict[str, Any]) -> Any:
    """The model, with the fastest experts that transformers has on CPU."""
    sizes = {
        "vocab_size": options["vocab"],
        "hidden_size": options["width"],
        "num_hidden_layers": options["layers"],
        "num_attention_heads": options["heads"],
        "num_key_value_heads": options["kv_heads"],
        "head_dim": options["head_dim"],
        "num_experts": options["experts"],
        "num_experts_per_tok": options["top_k"],
        "moe_intermediate_size": options["expert_hidden"],
    }
    config = Qwen3MoeConfig(**sizes, norm_topk_prob=True, tie_word_embeddings=True)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = Qwen3MoeForCausalLM(config)
    model = model.to(device, getattr(torch, options["dtype"])).eval()
    model.set_experts_implementation("grouped_mm")
    return model


@torch.inference_mode()
def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Medians over repeats after a warm-up, as moe_jax.generation.bench takes them."""
    model = build(options)
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    prompt = torch.randint(
        0, options["vocab"], (options["batch"], options["prompt"]), device=model.device
    )

    def timed(**inputs: Any) -> tuple[Any, float]:
        synchronize()
        start = time.perf_counter()
        found = model(**inputs, use_cache=True, logits_to_keep=1)
        synchronize()
        return found, time.perf_counter() - start

    prefills, steps = [], []
    for repeat in range(options["repeats"] + 1):
        found, seconds = timed(input_ids=prompt)
        prefills += [seconds] if repeat else []
        for _ in range(options["generated"] if repeat else 3):
            token = found.logits[:, -1:].argmax(-1)
            found, seconds = timed(input_ids=token, past_key_values=found.past_key_values)
            steps += [seconds] if repeat else []
    return {
        "prefill_tokens_per_second": options["batch"]
        * options["prompt"]
        / statistics.median(prefills),
        "decode_tokens_per_second": options["batch"] / statistics.median(steps),
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
