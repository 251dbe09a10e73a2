"""Series per second of a Chronos model on random weights, here and with chronos-forecasting in
torch, which take turns on this machine.

    python scripts/benchmark_chronos.py bolt-base --python /path/with/chronos/bin/python

The other interpreter needs chronos-forecasting and torch, nothing of this project; it makes the
checkpoint. Prints the figures as JSON. Without --python it prints only ours, for --folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTHS = {  # width, hidden, layers, heads of the published sizes; heads are 64 wide
    "tiny": (256, 1024, 4, 4),
    "small": (512, 2048, 6, 8),
    "base": (768, 3072, 12, 12),
}
LENGTHS = {"bolt": 2048, "t5": 512, "chronos2": 2048}  # of the series
HORIZON = 64


def main() -> None:
    """Measures what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="bolt, t5 or chronos2, and a size: bolt-base")
    parser.add_argument("--python", help="an interpreter with chronos-forecasting")
    parser.add_argument("--folder", type=Path, help="a checkpoint, in place of a new one")
    parser.add_argument("--series", type=int, default=16)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.theirs:
        print(json.dumps(measure(options, open_theirs(options))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = options.folder or Path(scratch)
        theirs = [ask_theirs(options)] if options.python else []
        ours = [measure(options, open_ours(options)) for _ in range(2)]
        theirs += [ask_theirs(options)] if options.python else []
    found = {"model": options.model, "series": options.series, "ours": summary(ours)}
    if theirs:
        found["theirs"] = summary(theirs)
        found["times"] = found["ours"]["median"] / found["theirs"]["median"]
    print(json.dumps(found, indent=1))


def summary(runs: list[list[float]]) -> dict[str, Any]:
    """Series per second of all repeats, and their median."""
    every = sorted(rate for run in runs for rate in run)
    return {"median": statistics.median(every), "least": every[0], "most": every[-1]}


def measure(options: argparse.Namespace, forecast: Any) -> list[float]:
    """Series per second of each repeat, after a warm-up."""
    rates = []
    for repeat in range(options.repeats + 1):
        start = time.perf_counter()
        forecast()
        seconds = time.perf_counter() - start
        rates += [options.series / seconds] if repeat else []
    return rates


def inputs(options: argparse.Namespace) -> Any:
    """Series of the whole context."""
    import numpy as np

    length = LENGTHS[options.model.partition("-")[0]]
    steps = np.arange(length) + np.arange(options.series)[:, None]
    noise = np.random.RandomState(0).randn(options.series, length)
    return (np.sin(steps / 9) + 0.1 * noise).astype(np.float32)


def open_ours(options: argparse.Namespace) -> Any:
    """A call that forecasts with moe_jax."""
    from moe_jax.forecasting.load import load_forecaster

    forecaster, series = load_forecaster(options.folder), inputs(options)
    samples = options.samples
    return lambda: forecaster.predict_quantiles(series, HORIZON, [0.5], num_samples=samples)


def ask_theirs(options: argparse.Namespace) -> list[float]:
    """What the other interpreter measures."""
    command = [
        *(options.python, __file__, options.model, "--theirs", "--folder", str(options.folder)),
        *("--series", str(options.series), "--samples", str(options.samples)),
        *("--repeats", str(options.repeats)),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def open_theirs(options: argparse.Namespace) -> Any:
    """A call that forecasts with chronos-forecasting; it writes the checkpoint if there is none."""
    import torch
    from chronos import BaseChronosPipeline

    if not (options.folder / "config.json").exists():
        make_checkpoint(options)
    pipeline: Any = BaseChronosPipeline.from_pretrained(options.folder)
    series = torch.tensor(inputs(options))
    if options.model.startswith("t5"):
        samples = options.samples
        return lambda: pipeline.predict_quantiles(series, HORIZON, [0.5], num_samples=samples)
    if options.model.startswith("chronos2"):
        series = series[:, None]
    return lambda: pipeline.predict_quantiles(series, HORIZON, [0.5])


def make_checkpoint(options: argparse.Namespace) -> None:
    """Writes a checkpoint of random weights as the library starts one."""
    import torch
    from chronos.chronos2.config import Chronos2CoreConfig
    from chronos.chronos2.model import Chronos2Model
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config, T5ForConditionalGeneration

    family, _, size = options.model.partition("-")
    width, hidden, layers, heads = WIDTHS[size]
    common: dict[str, Any] = {
        "d_model": width,
        "d_kv": 64,
        "d_ff": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "feed_forward_proj": "relu",
        "initializer_factor": 1.0,
    }
    patches = {"input_patch_size": 16, "input_patch_stride": 16, "use_reg_token": True}
    nine = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    torch.manual_seed(0)
    model: Any
    if family == "bolt":
        settings = {"context_length": 2048, "prediction_length": 64, "quantiles": nine, **patches}
        config = T5Config(**common, vocab_size=2, **start)
        config.chronos_config, config.chronos_pipeline_class = settings, "ChronosBoltPipeline"
        model = ChronosBoltModelForForecasting(config)
    elif family == "chronos2":
        levels = [round(0.05 * step, 2) for step in range(1, 20)]
        settings = {
            "context_length": 8192,
            "output_patch_size": 16,
            "max_output_patches": 64,
            "quantiles": [0.01, *levels, 0.99],
            "use_arcsinh": True,
            **patches,
        }
        config = Chronos2CoreConfig(**common, chronos_config=settings)
        config.chronos_pipeline_class = "Chronos2Pipeline"
        model = Chronos2Model(config)
    else:
        config = T5Config(**common, vocab_size=4096, **start)
        config.chronos_config = {
            "tokenizer_class": "MeanScaleUniformBins",
            "n_tokens": 4096,
            "eos_token_id": 1,
            "tokenizer_kwargs": {"low_limit": -15.0, "high_limit": 15.0},
            "n_special_tokens": 2,
            "pad_token_id": 0,
            "use_eos_token": True,
            "model_type": "seq2seq",
            "context_length": 512,
            "prediction_length": 64,
            "num_samples": 20,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        }
        model = T5ForConditionalGeneration(config)
    model.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
