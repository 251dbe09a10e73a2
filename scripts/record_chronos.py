"""Records what chronos-forecasting computes for the small checkpoints of tests/forecasting/cases:
python scripts/record_chronos.py DUMMIES [CASE ...]

DUMMIES is the folder `test` of the library's source distribution, whose dummy checkpoints are
copied and recorded too (pip download --no-deps --no-binary=:all: chronos-forecasting==2.3.2).
Needs chronos-forecasting and torch (the CPU build) beside numpy and safetensors, in an environment
of their own. Run again with the same versions it writes the same numbers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import chronos
import numpy as np
import torch
import transformers
from chronos import BaseChronosPipeline
from chronos.chronos2.config import Chronos2CoreConfig
from chronos.chronos2.model import Chronos2Model
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from transformers import T5Config, T5ForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import chronos_cases as cases
from tests.support.hf_cases import sample

DUMMIES = {
    "dummy-t5": "dummy-chronos-model",
    "dummy-bolt": "dummy-chronos-bolt-model",
    "dummy-chronos2": "dummy-chronos2-model",
}
LEVELS = [round(0.05 * step, 2) for step in range(1, 20)]
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "relu",
    "initializer_factor": 1.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bolt": {
        **T5,
        "vocab_size": 2,
        "model_type": "t5",
        "architectures": ["ChronosBoltModelForForecasting"],
        "chronos_pipeline_class": "ChronosBoltPipeline",
        "chronos_config": {
            "context_length": 96,
            "prediction_length": 16,
            "input_patch_size": 8,
            "input_patch_stride": 8,
            "use_reg_token": True,
            "quantiles": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        },
    },
    "chronos2": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "relu",
        "initializer_factor": 1.0,
        "rope_theta": 10000.0,
        "model_type": "t5",
        "architectures": ["Chronos2Model"],
        "chronos_pipeline_class": "Chronos2Pipeline",
        "chronos_config": {
            "context_length": 128,
            "input_patch_size": 8,
            "input_patch_stride": 8,
            "output_patch_size": 8,
            "max_output_patches": 4,
            "time_encoding_scale": 128,
            "use_reg_token": True,
            "use_arcsinh": True,
            "quantiles": [0.01, *LEVELS, 0.99],
        },
    },
    "t5": {
        **T5,
        "vocab_size": 64,
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "chronos_config": {
            "tokenizer_class": "MeanScaleUniformBins",
            "model_type": "seq2seq",
            "tokenizer_kwargs": {"low_limit": -15.0, "high_limit": 15.0},
            "n_tokens": 64,
            "n_special_tokens": 2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "use_eos_token": True,
            "context_length": 96,
            "prediction_length": 16,
            "num_samples": 20,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    },
}
GAP = 1e-3  # least difference of the two largest logits at each greedy token


def main() -> None:
    """Records the cases that are named, by default all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dummies", type=Path)
    parser.add_argument("cases", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases.FOLDER.mkdir(exist_ok=True)
    for case in arguments.cases or [*CONFIGS, *DUMMIES]:
        if case in DUMMIES:
            arrays = record_dummy(case, arguments.dummies / DUMMIES[case])
        else:
            arrays = record(case)
        arrays = {name: in_f32(array) for name, array in arrays.items()}
        np.savez_compressed(cases.FOLDER / f"{case}.npz", **arrays)
        print(case, {name: array.shape for name, array in arrays.items()})


def in_f32(array: Any) -> np.ndarray:
    """An array as it is kept."""
    array = np.asarray(array.detach() if isinstance(array, torch.Tensor) else array)
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int32)


def record(case: str) -> dict[str, Any]:
    """Writes the case's JSON file, and returns what its checkpoint gives."""
    config = CONFIGS[case]
    make: Any = {
        "bolt": lambda: ChronosBoltModelForForecasting(T5Config(**config)),
        "chronos2": lambda: Chronos2Model(Chronos2CoreConfig(**config)),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**config)),
    }[case]
    tied = ("embed_tokens.weight", "lm_head.weight")
    tensors = {
        name: list(tensor.shape)
        for name, tensor in make().state_dict().items()
        if not name.endswith(tied)
    }
    outcomes: Any = {"bolt": bolt, "chronos2": chronos2, "t5": t5}[case]
    for seed in range(100):
        description = {
            "seed": seed,
            "versions": {
                module.__name__: module.__version__ for module in (chronos, torch, transformers)
            },
            "config": config,
            "tensors": tensors,
        }
        with tempfile.TemporaryDirectory() as scratch:
            folder = cases.write_checkpoint(description, case, Path(scratch))
            pipeline = BaseChronosPipeline.from_pretrained(folder, attn_implementation="eager")
            arrays = outcomes(pipeline)
        if arrays is not None:
            break
    else:
        raise SystemExit(f"{case}: no seed gives tokens that do not hang on rounding.")
    text = json.dumps(description, indent=1)
    (cases.FOLDER / f"{case}.json").write_text(text + "\n", encoding="utf-8")
    return arrays


def record_dummy(case: str, source: Path) -> dict[str, Any]:
    """Copies a checkpoint of the library's tests, and returns what it gives: `context` and, of 70
    steps, `quantiles` [B, 70, LEVELS] and `mean` [B, 70]; a T5's are its likeliest tokens.
    """
    folder = cases.FOLDER / case
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, folder / name)
    pipeline = BaseChronosPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    context = cases.awkward_series(120)[[0, 3, 5, 10]]
    greedy = {"top_k": 1, "num_samples": 1} if case == "dummy-t5" else {}
    inputs = [torch.tensor(row) for row in context]
    quantiles, mean = pipeline.predict_quantiles(inputs, 70, list(cases.LEVELS), **greedy)
    if isinstance(quantiles, list):
        quantiles, mean = torch.cat(quantiles), torch.cat(mean)
    return {"context": context, "quantiles": quantiles, "mean": mean}


def gradients(model: Any, loss: torch.Tensor) -> dict[str, Any]:
    """`loss`, and of its gradients by tensors in the order of their names: `norms` [N], `entries`
    [N, 16].
    """
    model.zero_grad()
    loss.backward()
    tied = ("embed_tokens.weight", "lm_head.weight")
    parts = {
        name: parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if not name.endswith(tied)
    }
    ordered = [parts[name] for name in sorted(parts)]
    return {
        "loss": loss,
        "norms": np.array([np.linalg.norm(part) for part in ordered]),
        "entries": np.stack([sample(part) for part in ordered]),
    }


def bolt(pipeline: Any) -> dict[str, Any]:
    """`context` [11, 120]; `states` of the encoder; `quantiles` [11, 9, 60] of 60 steps and
    `at_levels` [11, 20, LEVELS] of 20; `target` [11, 16] with its loss and gradients, and the
    `short_loss` of its first ten steps.
    """
    context, model = cases.awkward_series(120), pipeline.model
    target = target_after(context, 16)
    inputs, goal = torch.tensor(context), torch.tensor(target)
    short = model(inputs, target=goal[:, :10].clone()).loss
    return {
        "context": context,
        "states": pipeline.embed(inputs)[0],
        "quantiles": pipeline.predict(inputs, 60),
        "at_levels": pipeline.predict_quantiles(inputs, 20, list(cases.LEVELS))[0],
        "target": target,
        "short_loss": short,
        **gradients(model, model(inputs, target=goal.clone()).loss),
    }


def target_after(context: np.ndarray, steps: int) -> np.ndarray:
    """What might come after each row, with some of it missing."""
    size = cases.size_of(context)[:, None]
    noise = np.random.RandomState(3).randn(len(context), steps)
    target = (np.nan_to_num(context[:, -steps:]) + size * noise).astype(np.float32)
    target[::3, 4:7] = np.nan
    return target


def chronos2(pipeline: Any) -> dict[str, Any]:
    """The arrays of `grouped` and `tasks`."""
    return {**grouped(pipeline.model), **tasks(pipeline)}


def grouped(model: Any) -> dict[str, Any]:
    """Of rows that are in groups: `context` [6, 100], `groups` [6], `future` [6, 24] that is partly
    known; `states` of the encoder, `mask` of its positions, `quantiles` [6, 21, 24]; `target` with
    its loss and gradients.
    """
    context = cases.awkward_series(120)[[0, 3, 4, 5, 6, 10], -100:]
    groups = np.array([0, 0, 1, 1, 1, 2])
    future = np.full((6, 24), np.nan, np.float32)
    known = target_after(context, 24)
    future[1], future[3] = known[1], known[3]
    target = target_after(context, 24)
    given = {
        "context": torch.tensor(context),
        "group_ids": torch.tensor(groups),
        "future_covariates": torch.tensor(future),
        "num_output_patches": 3,
    }
    encoded = model.encode(**given)[0].last_hidden_state
    mask = model._prepare_patched_context(torch.tensor(context))[1]
    output = model(**given, future_target=torch.tensor(target))
    return {
        "context": context,
        "groups": groups,
        "future": future,
        "states": encoded,
        "mask": mask.int(),
        "quantiles": output.quantile_preds,
        "target": target,
        **gradients(model, output.loss),
    }


def tasks(pipeline: Any) -> dict[str, Any]:
    """By `predict`: `one` [11, 21, 24] of the rows `series`, `jointly` [11, 21, 24] of the same
    rows learning from each other, `long` [2, 21, 80] of the first and the fourth, `levels` [11, 24,
    LEVELS]; `three` [2, 3, 21, 24] of `series` 3 to 5 and 4 to 6 as targets; and of two tasks with
    the target `series` 3 and 4, the past covariate 5 and the covariate 10, whose `future` is
    `known` [2, 50]: `covariates` [2, 21, 24] and `covariates_long` [2, 21, 50].
    """
    series = cases.awkward_series(160)
    rows = [torch.tensor(row[~np.isnan(row)] if at < 4 else row) for at, row in enumerate(series)]
    one = pipeline.predict(rows, 24)
    three = pipeline.predict([torch.tensor(series[3:6]), torch.tensor(series[4:7])], 24)
    known = np.stack([np.arange(50) % 12, 1 + np.arange(50) % 6]).astype(np.float32)

    def task(at: int, steps: int) -> dict[str, Any]:
        past = {"a": series[5, -150:], "b": series[10, -150:]}
        return {
            "target": series[3 + at, -150:],
            "past_covariates": past,
            "future_covariates": {"b": known[at, :steps]},
        }

    covariates = pipeline.predict([task(0, 24), task(1, 24)], 24)
    covariates_long = pipeline.predict([task(0, 50), task(1, 50)], 50)
    return {
        "series": series,
        "one": torch.cat(one),
        "jointly": torch.cat(pipeline.predict(rows, 24, cross_learning=True)),
        "long": torch.cat(pipeline.predict([rows[0], rows[3]], 80)),
        "levels": torch.cat(pipeline.predict_quantiles(rows, 24, list(cases.LEVELS))[0]),
        "three": torch.stack(three),
        "known": known,
        "covariates": torch.cat(covariates),
        "covariates_long": torch.cat(covariates_long),
    }


def t5(pipeline: Any) -> dict[str, Any] | None:
    """`context` [11, 120], its `ids`, `mask` and `scale`; every eighth of the encoder's `states`;
    `labels` [11, 17] of `target`, their `logits`, loss and gradients; `greedy` [11, 16], the
    likeliest tokens, and `path` [11, 40], the values of the likeliest 40. None if two tokens are
    nearly as likely.
    """
    context, model, tokenizer = cases.awkward_series(120), pipeline.model.model, pipeline.tokenizer
    ids, mask, scale = tokenizer.context_input_transform(torch.tensor(context))
    target = target_after(context, 16)
    labels, seen = tokenizer.label_input_transform(torch.tensor(target), scale)
    output = model(input_ids=ids, attention_mask=mask, labels=labels.masked_fill(~seen, -100))
    greedy = pipeline.model(ids, mask, 16, num_samples=1, top_k=1)[:, 0]
    started = torch.cat([torch.zeros_like(greedy[:, :1]), greedy], dim=1)
    steps = model(input_ids=ids, attention_mask=mask, decoder_input_ids=started).logits[:, :-1]
    steps[..., 1] = -torch.inf
    best = steps.topk(2).values
    path = pipeline.predict(torch.tensor(context), 40, num_samples=1, top_k=1)[:, 0]
    nudged = pipeline.predict(torch.tensor(context * (1 + 1e-5)), 40, num_samples=1, top_k=1)[:, 0]
    size = cases.size_of(context)[:, None]
    steady = bool((abs(nudged - path).numpy() < 1e-3 * size).all())
    gap, different = float((best[..., 0] - best[..., 1]).min()), len(greedy.unique())
    if gap < GAP or not steady or different < 8:
        return None
    return {
        "context": context,
        "ids": ids,
        "mask": mask.int(),
        "scale": scale,
        "states": pipeline.embed(torch.tensor(context))[0][:, ::8],
        "target": target,
        "labels": labels,
        "label_mask": seen.int(),
        "logits": output.logits,
        "greedy": greedy,
        "path": path,
        **gradients(model, output.loss),
    }


if __name__ == "__main__":
    main()
