"""Records what transformers computes for the small checkpoints of tests/hf/cases: python
scripts/record_hf_cases.py [CASE ...]

A new case is a file tests/hf/cases/NAME.json with a `note` and a `config` (a hub repository's
config.json) written by hand; NAME begins with the config's model_type and a dash. This script fills
in the rest of that file and writes NAME.npz; what both mean is in tests/support/hf_cases.py. Run
again with the same versions it writes the same bytes.

Needs torch and transformers beside numpy and safetensors: pip install torch (the CPU build
suffices).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers.utils.quantization_config import Mxfp4Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import hf_cases as cases

LENGTHS = (24, 17, 9)  # of the rows of a padded batch
PROMPT = 12
GREEDY = 64
DIFFERENT = 12  # tokens at least among the greedy ones: a text that repeats itself compares little
GAP = 1e-3  # least difference of the two largest logits at each greedy token
SHAKE = (
    3e-5  # relative change of all weights that may change neither the experts nor the greedy tokens
)
SEEDS = 100


def record(case: str) -> None:
    """Writes both files of a case, with the first seed whose outcome is varied and does not hang on
    rounding.
    """
    description = {
        key: value for key, value in cases.describe(case).items() if key in ("note", "config")
    }
    config = description["config"]
    if cases.family(case) != config["model_type"]:
        raise SystemExit(
            f"tests/hf/cases/{case}.json: the name must begin with model_type "
            f"{config['model_type']!r} and a dash."
        )
    with tempfile.TemporaryDirectory() as scratch:
        tensors = hub_tensors(config, Path(scratch) / "shapes")
        for seed in range(SEEDS):
            filled = {
                **description,
                "seed": seed,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tensors": tensors,
            }
            folder = cases.write_checkpoint(filled, case, Path(scratch) / f"seed{seed}")
            arrays = outcome(folder, case, seed)
            if arrays is not None:
                break
        else:
            raise SystemExit(
                f"{case}: no seed below {SEEDS} gives a varied outcome that does not hang on "
                f"rounding; change its config."
            )
        if case in cases.TRAINED:
            arrays |= training_step(folder, arrays["tokens"])
    (cases.FOLDER / f"{case}.json").write_text(readable_json(filled), encoding="utf-8")
    np.savez_compressed(cases.FOLDER / f"{case}.npz", **arrays)
    size = (cases.FOLDER / f"{case}.npz").stat().st_size
    print(
        f"{case}: seed {seed}, {size / 1024:.1f} KiB, {len(np.unique(arrays['greedy']))} "
        f"different greedy tokens",
        flush=True,
    )


def hub_tensors(config: dict[str, Any], folder: Path) -> dict[str, list[int]]:
    """Names and shapes of what transformers saves for a config; runs of numbered experts are one
    entry, see cases.py.
    """
    folder.mkdir()
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    model.save_pretrained(folder)
    found: dict[str, list[int]] = {}
    with safe_open(folder / "model.safetensors", "np") as file:
        for name in sorted(file.keys()):
            shape = file.get_slice(name).get_shape()
            general = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
            if general == name:
                found |= packed(name, shape) if "quantization_config" in config else {name: shape}
            else:
                found[general] = [found.get(general, [0])[0] + 1, *shape]
    return found


def packed(name: str, shape: list[int]) -> dict[str, list[int]]:
    """The MXFP4 tensors in place of a gpt-oss expert matrix: outputs before inputs, 32 inputs in 16
    bytes under one scale.
    """
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: shape}
    experts, inputs, outputs = shape
    return {
        f"{name}_blocks": [experts, outputs, inputs // 32, 16],
        f"{name}_scales": [experts, outputs, inputs // 32],
    }


def load(folder: Path) -> Any:
    """The model as a user of transformers loads it, in f32 with the plainest code paths."""
    extra = {}
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        extra["quantization_config"] = Mxfp4Config(dequantize=True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        **extra,
    )
    model, report = loaded
    wrong = {kind: names for kind, names in report.items() if names}
    if wrong:
        raise SystemExit(
            f"{folder}: transformers does not take these tensors as they are: {wrong}."
        )
    model.generation_config.eos_token_id = None
    return model.eval()


def outcome(folder: Path, case: str, seed: int) -> dict[str, Any] | None:
    """What a case's checkpoint computes, see cases.expected; None if a choice in it hangs on
    rounding or the text hardly varies.
    """
    model = load(folder)
    tokens = (
        np.random.Philox(key=seed).random_raw(len(LENGTHS) * max(LENGTHS)).reshape(len(LENGTHS), -1)
        % model.config.vocab_size
    )
    tokens = torch.from_numpy(tokens.astype(np.int64))
    prompt = tokens[:1, :PROMPT]
    dynamic = model.model.rotary_emb.rope_type == "dynamic"
    greedy, gap = generate(model, prompt)
    whole = torch.cat([prompt, torch.from_numpy(greedy)[None]], dim=1)
    logits, chosen = run(model, tokens)
    arrays: dict[str, Any] = {
        "tokens": tokens.numpy().astype(np.int32),
        "lengths": np.asarray(LENGTHS, np.int32),
        "logits": logits[0],
        "last": logits[:, -1],
        "right": padded(model, tokens, right=True),
        "left": padded(model, tokens, right=False),
        "prompt": prompt[0].numpy().astype(np.int32),
        "greedy": greedy.astype(np.int32),
    }
    steady = gap > GAP and len(np.unique(greedy)) >= DIFFERENT
    if dynamic:
        uncached, gap = reread(model, prompt)
        arrays["uncached"] = uncached.astype(np.int32)
        steady = steady and gap > GAP
    else:
        expect_same(case, arrays, logits)
    if chosen:
        arrays["experts"] = np.stack(chosen)[:, 0].astype(np.uint8)
    late = run(model, whole)[1]
    shake(model)
    steady = steady and np.array_equal(generate(model, prompt)[0], greedy)
    if dynamic:
        steady = steady and np.array_equal(reread(model, prompt)[0], uncached)
    for before, text in ((chosen, tokens), (late, whole)):
        steady = steady and all(map(np.array_equal, before, run(model, text)[1]))
    return arrays if steady else None


def run(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits f32 [B, S, V], and of each layer with experts those chosen, ascending [B, S, K]."""
    forget(model)
    chosen: list[np.ndarray] = []

    def keep(_module: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        chosen.append(np.sort(output[2].numpy(), axis=-1).reshape(*tokens.shape, -1))

    hooks = [
        module.register_forward_hook(keep)
        for module in model.modules()
        if type(module).__name__.lower().endswith("topkrouter")
    ]
    mask = torch.ones_like(tokens) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits.numpy()
    for hook in hooks:
        hook.remove()
    return logits, chosen


def forget(model: Any) -> None:
    """Dynamic scaling remembers the longest text that it has seen; each computation here starts
    without that.
    """
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def padded(model: Any, tokens: torch.Tensor, right: bool) -> np.ndarray:
    """Logits f32 [B, V] at each row's last token, rows cut to LENGTHS and padded on the right or
    left.
    """
    size = max(LENGTHS)
    rows, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for number, length in enumerate(LENGTHS):
        place = slice(0, length) if right else slice(size - length, size)
        rows[number, place], mask[number, place] = tokens[number, :length], 1
    logits = run(model, rows, mask)[0]
    return np.stack(
        [logits[number, length - 1 if right else size - 1] for number, length in enumerate(LENGTHS)]
    )


def expect_same(case: str, arrays: dict[str, np.ndarray], logits: np.ndarray) -> None:
    """Padding changes nothing: a case where transformers disagrees with itself would be no
    reference.
    """
    plain = np.stack([logits[number, length - 1] for number, length in enumerate(LENGTHS)])
    for side in ("right", "left"):
        error = np.abs(arrays[side] - plain).max() / np.abs(plain).max()
        if error > 1e-5:
            raise SystemExit(
                f"{case}: transformers' own logits differ by {error:.1e} of the largest when "
                f"padded on the {side}."
            )


def generate(model: Any, prompt: torch.Tensor) -> tuple[np.ndarray, float]:
    """Likeliest tokens [GREEDY] by transformers' cached generation, and the least difference of the
    two largest logits.
    """
    forget(model)
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=GREEDY,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(found.logits).topk(2).values
    return found.sequences[0, PROMPT:].numpy(), float((best[..., 0] - best[..., 1]).min())


def reread(model: Any, prompt: torch.Tensor) -> tuple[np.ndarray, float]:
    """As `generate`, without a cache: every token comes from a run over the whole text."""
    text, gap = prompt, float("inf")
    for _ in range(GREEDY):
        best = torch.from_numpy(run(model, text)[0][0, -1]).topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        text = torch.cat([text, best.indices[:1, None]], dim=1)
    return text[0, PROMPT:].numpy(), gap


def shake(model: Any) -> None:
    """Changes every weight by a random share of up to SHAKE."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + SHAKE * (2 * torch.rand(weight.shape, generator=generator) - 1))


def training_step(folder: Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Loss and gradients, with the router's auxiliary loss and without; see cases.expected."""
    arrays: dict[str, np.ndarray] = {}
    text = torch.from_numpy(tokens.astype(np.int64))
    for ending, auxiliary in (("", True), ("_without", False)):
        model = load(folder)
        loss = model(
            input_ids=text, labels=text, output_router_logits=auxiliary, use_cache=False
        ).loss
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.grad)
        # Saving the gradients as if they were weights gives them the hub's names and layout.
        saved = folder / f"gradients{ending}"
        model.save_pretrained(saved)
        gradients = sorted(load_file(saved / "model.safetensors").items())
        arrays[f"loss{ending}"] = loss.detach().numpy()
        arrays[f"norms{ending}"] = np.asarray(
            [np.linalg.norm(gradient.astype(np.float64)) for _, gradient in gradients], np.float32
        )
        arrays[f"entries{ending}"] = np.stack([cases.sample(gradient) for _, gradient in gradients])
    return arrays


def readable_json(value: dict[str, Any]) -> str:
    """Indented, with lists of numbers on one line."""
    text = json.dumps(value, indent=1)
    return (
        re.sub(
            r"\[[\s\d,]*\]", lambda found: "[" + ", ".join(re.findall(r"\d+", found[0])) + "]", text
        )
        + "\n"
    )


def main() -> None:
    """Records the named cases, or all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "case", nargs="*", help="names of cases; all of tests/hf/cases where none is given"
    )
    names = parser.parse_args().case or cases.CASES
    unknown = sorted(set(names) - set(cases.CASES))
    if unknown:
        parser.error(f"no such case in tests/hf/cases: {', '.join(unknown)}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in names:
        record(name)


if __name__ == "__main__":
    main()
