"""Series per second of a Chronos model on random weights, here and with chronos-forecasting in
torch, which take turns on this machine.

    python scripts/benchmark_chronos.py bolt-base --python /path/with/chronos/bin/python

The other interpreter needs chronos-forecasting and torch, nothing of this project; it makes the
checkpoint. Prints the figures as JSON. Without --python it prints only ours, for --folder.

The floor of a turn is the FLOPs of all matmuls in the programs that it runs, divided by the rate of
a large matmul that is measured just before it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, help="series computed together here")
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.theirs:
        answer_turns(open_theirs(options))
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = options.folder or Path(scratch)
        turns: dict[str, Iterator[float]] = {}
        if options.python:
            turns["theirs"] = ask_theirs(options)
            next(turns["theirs"])  # which makes the checkpoint
        forecast, flops = open_ours(options)
        turns |= {"rate": matmul_rates(), "ours": seconds_of(forecast)}
        seconds = [
            {name: next(turn) for name, turn in turns.items()} for _ in range(options.repeats)
        ]
    found: dict[str, Any] = {"model": options.model, "series": options.series}
    for name in turns.keys() - {"rate"}:
        found[name] = summary([options.series / turn[name] for turn in seconds])
    found["GFLOP per series"] = flops / options.series / 1e9
    found["GFLOP/s of a matmul"] = summary([turn["rate"] / 1e9 for turn in seconds])
    shares = [flops / turn["rate"] / turn["ours"] for turn in seconds]
    found["floor / ours"] = summary(shares)
    if options.python:
        times = sorted(turn["theirs"] / turn["ours"] for turn in seconds)
        found["times"] = {"median of turns": statistics.median(times), "of each": times}
    print(json.dumps(found, indent=1))


def summary(rates: list[float]) -> dict[str, float]:
    """Series per second."""
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}


def matmul_rates() -> Iterator[float]:
    """FLOP/s of a large matmul, whenever they are asked for."""
    from moe_jax.profiling.machine import matmul_rate

    while True:
        yield matmul_rate("float32", seconds=0.3)[0]


def seconds_of(forecast: Callable[[], Any]) -> Iterator[float]:
    """Of one forecast after another, as they are asked for."""
    while True:
        start = time.perf_counter()
        forecast()
        yield time.perf_counter() - start


def answer_turns(forecast: Callable[[], Any]) -> None:
    """The seconds of a forecast for each line of stdin."""
    for _, seconds in zip(sys.stdin, seconds_of(forecast), strict=False):
        print(seconds, flush=True)


def inputs(options: argparse.Namespace) -> Any:
    """Series of the whole context."""
    import numpy as np

    length = LENGTHS[options.model.partition("-")[0]]
    steps = np.arange(length) + np.arange(options.series)[:, None]
    noise = np.random.RandomState(0).randn(options.series, length)
    return (np.sin(steps / 9) + 0.1 * noise).astype(np.float32)


def open_ours(options: argparse.Namespace) -> tuple[Callable[[], Any], float]:
    """A call that forecasts with moe_jax, compiled, and the FLOPs of its matmuls."""
    from moe_jax.forecasting.load import load_forecaster
    from moe_jax.profiling.hlo import dot_flops

    forecaster: Any = load_forecaster(options.folder)
    series, placed = inputs(options), forecaster.placed
    extra = {"num_samples": options.samples}
    extra |= {"batch_size": options.batch} if options.batch else {}
    flops, run = [], placed.run

    def counting(method: Any, *rows: Any, **static: Any) -> Any:
        text = placed.program(method, **static).lower(placed.state, *rows).compile().as_text()
        flops.append(dot_flops(text)[0])
        return run(method, *rows, **static)

    def forecast() -> Any:
        return forecaster.predict_quantiles(series, HORIZON, [0.5], **extra)

    placed.run = counting
    forecast()
    placed.run = run
    return forecast, sum(flops)


def ask_theirs(options: argparse.Namespace) -> Iterator[float]:
    """`seconds_of` the other interpreter, which waits between them."""
    command = [
        *(options.python, __file__, options.model, "--theirs", "--folder", str(options.folder)),
        *("--series", str(options.series), "--samples", str(options.samples)),
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        while True:
            process.stdin.write("\n")
            process.stdin.flush()
            yield float(process.stdout.readline())


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
