"""transformers' Qwen3-MoE on random weights, in training or in prefill and decoding: the other side
of `benchmark.py train` and `generate` with `--against transformers`.

Takes what to measure and the options as JSON, and prints the figures as JSON. Needs torch and
transformers, nothing of this project.
"""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import sys
import time
from typing import Any

import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def build(options: dict[str, Any]) -> Any:
    """The model in f32, with the fastest experts that transformers has on CPU."""
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
    tied = not options.get("untied", False)
    config = Qwen3MoeConfig(**sizes, norm_topk_prob=True, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model: Any = Qwen3MoeForCausalLM(config)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.set_experts_implementation("grouped_mm")
    return model


def synchronize() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train(options: dict[str, Any]) -> dict[str, Any]:
    """The median step: AdamW on f32 masters, the gradient's norm clipped, as ours."""
    model = build(options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    shape = (options["batch"], options["seq"])
    half = options["dtype"] == "bfloat16"

    def step() -> None:
        tokens = torch.randint(0, options["vocab"], shape, device=model.device)
        precision = (
            torch.autocast(model.device.type, torch.bfloat16) if half else contextlib.nullcontext()
        )
        with precision:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = []
    for repeat in range(options["warmup"] + options["steps"]):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        seconds += [time.perf_counter() - start] if repeat >= options["warmup"] else []
    return {"tokens_per_second": options["batch"] * options["seq"] / statistics.median(seconds)}


@torch.inference_mode()
def generate(options: dict[str, Any]) -> dict[str, Any]:
    """Medians over repeats after a warm-up, as moe_jax.generation.bench takes them."""
    model = build(options).to(getattr(torch, options["dtype"])).eval()
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
    for repeat in range(options["steps"] + 1):
        found, seconds = timed(input_ids=prompt)
        prefills += [seconds] if repeat else []
        for _ in range(options["generated"] if repeat else 3):
            token = found.logits[:, -1:].argmax(-1)
            found, seconds = timed(input_ids=token, past_key_values=found.past_key_values)
            steps += [seconds] if repeat else []
    tokens = options["batch"] * options["prompt"]
    return {
        "prefill_tokens_per_second": tokens / statistics.median(prefills),
        "decode_tokens_per_second": options["batch"] / statistics.median(steps),
    }


def main(what: str, options: str) -> None:
    """Prints the figures."""
    figures = {"train": train, "generate": generate}[what](json.loads(options))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures["peak_bytes"] = peak if sys.platform == "darwin" else peak * 1024
    figures["version"] = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
