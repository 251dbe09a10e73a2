"""Small checkpoints that transformers has run, and what it computed: the comparisons of this folder
start here.

A case is two files in `cases/`: NAME.json says what the checkpoint looks like (`note` and `config`
are written by hand, `seed`, `torch`, `transformers` and `tensors` by scripts/record_hf_cases.py),
and NAME.npz holds what transformers made of it (`expected` lists the arrays). The weights
themselves are not kept: `build` draws them again from the tensors' names. Needs numpy and
safetensors, neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parents[1] / "hf" / "cases"
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))
TRAINED = tuple(case for case in CASES if case in ("qwen3_moe-plain", "mixtral-plain"))
"""Cases that also hold a training step."""
ENTRIES = 16
"""Entries of a gradient that are kept."""


def describe(case: str) -> dict[str, Any]:
    """The content of a case's JSON file."""
    return json.loads((FOLDER / f"{case}.json").read_text(encoding="utf-8"))


def family(case: str) -> str:
    """The case's `model_type`."""
    return case.partition("-")[0]


def expected(case: str) -> dict[str, np.ndarray]:
    """What transformers computed, in f32 with eager attention on one CPU thread.

    With rows B, positions S, vocabulary V, layers with experts L and choices K, the arrays are

    - tokens i32 [B, S] and lengths i32 [B]: the input; padded batches hold the first `lengths[b]`
    tokens of row b - logits f32 [S, V]: of the first row whole - last f32 [B, V]: at the last
    position of each row, all rows whole - right, left f32 [B, V]: at the last token of each row,
    padded on the right and on the left. Dynamic rotary scaling
      stretches all rows of a batch by the longest, so that there the padded rows differ from the
      same rows by themselves
    - experts u8 [L, S, K]: those chosen for the first row, ascending; only where there are experts
    - prompt i32 [12] and greedy i32 [64]: likeliest tokens after the prompt by `generate`, no token
    ending the text - uncached i32 [64]: as greedy, but the whole text is read anew for every token.
    Only with dynamic scaling, where that
      differs: a cache keeps keys as they were rotated when they were first read
    - loss, loss_without f32 []: mean cross-entropy of each row's tokens from the second on, with
      router_aux_loss_coef x the router's auxiliary loss, and without; only in `TRAINED`
    - norms, norms_without f32 [N] and entries, entries_without f32 [N, ENTRIES]: of the gradients
    of both, in the order of
      `sorted(shapes(case))`; see `sample`
    """
    with np.load(FOLDER / f"{case}.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the checkpoint, by its name there."""
    return _expand(describe(case)["tensors"])


def build(case: str, folder: Path) -> Path:
    """Writes config.json and model.safetensors as a hub repository has them into `folder`, and
    returns it.
    """
    return write_checkpoint(describe(case), case, folder)


def write_checkpoint(description: dict[str, Any], case: str, folder: Path) -> Path:
    """`build` for a description that need not be on disk yet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(description["config"], indent=2), encoding="utf-8"
    )
    tensors = {
        name: draw(f"{case}/{description['seed']}", name, shape)
        for name, shape in _expand(description["tensors"]).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sample(gradient: np.ndarray) -> np.ndarray:
    """ENTRIES entries of an array, evenly spread over it in row-major order from the first to the
    last.
    """
    return gradient.reshape(-1)[np.linspace(0, gradient.size - 1, ENTRIES).astype(np.int64)]


def draw(stream: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor that depends on nothing but the arguments.

    The bits are those of Philox-4x64 (Salmon et al., 2011) under the first 16 bytes of SHA-256 of
    "stream/name" as its key, which numpy promises to keep; the upper 24 of each word give a number
    that is uniform in [-1, 1) and exact in f32. Scales are such that scores, routing and logits
    spread: a matrix has a standard deviation of 1.2/sqrt(inputs), routers and heads 3/sqrt(inputs),
    norms lie in 1 +- 0.3, biases and sinks in +- 0.3, embeddings in +- 0.25. MXFP4 blocks are
    random bytes, u8, and their scales 2^-5 to 2^-3.
    """
    key = int.from_bytes(hashlib.sha256(f"{stream}/{name}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(math.prod(shape)).reshape(shape)
    if name.endswith("_blocks"):
        return (words >> np.uint64(56)).astype(np.uint8)
    if name.endswith("_scales"):
        return (127 - 5 + words % np.uint64(3)).astype(np.uint8)
    uniform = (words >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
    if "norm" in name:
        return 1 + np.float32(0.3) * uniform
    if "bias" in name or name.endswith("sinks"):
        return np.float32(0.3) * uniform
    if name == "model.embed_tokens.weight":
        return np.float32(0.25) * uniform
    router = name.endswith((".gate.weight", ".router.weight"))
    inputs = (
        shape[-2] if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else shape[-1]
    )
    return (
        np.float32((3 if router or name == "lm_head.weight" else 1.2) * math.sqrt(3 / inputs))
        * uniform
    )


def _expand(tensors: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes one by one: a `*` in a name counts from 0, and its shape begins with how
    far.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        if "*" in name:
            found |= {
                name.replace("*", str(number)): tuple(shape[1:]) for number in range(shape[0])
            }
        else:
            found[name] = tuple(shape)
    return found


# Ten times stricter than is promised: what is beyond rounding is a mistake, however small.
TOLERANCE = 1e-5


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal but for a share of the largest entry."""
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()
