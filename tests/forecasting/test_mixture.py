"""Forecasts of the mixture: what a route depends on, that it is kept, and runs as models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.cli import main
from moe_jax.config.load import load_config
from moe_jax.data.series.corpus import open_corpus, write_corpus
from moe_jax.data.series.windows import SeriesWindows, WindowSettings
from moe_jax.errors import UserError
from moe_jax.forecasting.bolt import BoltForecaster
from moe_jax.forecasting.load import load_forecaster
from moe_jax.forecasting.mixture import series_routes
from moe_jax.profiling import machine
from moe_jax.tracking.metrics import read_metrics
from moe_jax.training import trainer as training
from tests.support.small_forecasters import (
    CONTEXT,
    EXPERTS,
    HORIZON,
    TOP_K,
    make_forecaster,
)
from tests.support.tiny_run import copy_until, shared_program

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@pytest.fixture(scope="module")
def forecaster() -> BoltForecaster:
    return make_forecaster()


def some_series(count: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [
        np.float32(np.sin(np.arange(CONTEXT) / one) + rng.standard_normal(CONTEXT) / 3)
        for one in range(1, count + 1)
    ]


def test_what_comes_before_a_series_changes_neither_its_route_nor_its_forecast(
    forecaster: BoltForecaster,
) -> None:
    rows = np.stack(some_series())[:, -10:]
    nothing = np.full((len(rows), 6), np.nan, np.float32)
    short, long = (
        series_routes(forecaster, np.concatenate(parts, axis=1))
        for parts in ([nothing[:, :2], rows], [nothing, rows])
    )
    np.testing.assert_array_equal(short.expert_TK, long.expert_TK)
    np.testing.assert_allclose(short.weight_TK, long.weight_TK, rtol=1e-5)
    np.testing.assert_allclose(
        forecaster.predict(list(rows)), forecaster.predict([*np.hstack([nothing, rows])]), atol=1e-5
    )
    # Routes are of series, and not all the same.
    assert len({tuple(sorted(row)) for row in short.expert_TK.tolist()}) > 1
    np.testing.assert_allclose(short.weight_TK.sum(axis=1), 1, rtol=1e-6)


def test_the_order_of_values_matters(forecaster: BoltForecaster) -> None:
    series = some_series()
    shuffled = [np.random.default_rng(2).permutation(one) for one in series]
    assert (
        np.abs(forecaster.predict(series) - forecaster.predict(shuffled)).max(axis=(1, 2)).min()
        > 1e-3
    )


def test_a_route_is_kept_beyond_one_pass(
    forecaster: BoltForecaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, tuple[np.ndarray, ...]]] = []
    whole = forecaster._pass

    def noted(context: np.ndarray, kept: tuple[np.ndarray, ...] = ()) -> Any:
        passes.append((len(context), kept))
        return whole(context, kept)

    monkeypatch.setattr(forecaster, "_pass", noted)
    series = some_series(2)
    far = forecaster.predict(series, 2 * HORIZON + 1)
    assert far.shape == (2, 9, 2 * HORIZON + 1)
    routes = series_routes(forecaster, np.stack(series))
    assert [rows for rows, _ in passes] == [2, 18, 18]  # nine quantiles of each are its paths
    for _, kept in passes[1:]:
        np.testing.assert_array_equal(kept[0], np.repeat(routes.expert_TK, 9, axis=0))
        np.testing.assert_array_equal(kept[1], np.repeat(routes.weight_TK, 9, axis=0))
    # Another route would be another forecast.
    context = np.stack(series)
    other = (routes.expert_TK + 1) % EXPERTS
    changed, _ = whole(context, (other, routes.weight_TK))
    same, _ = whole(context, tuple(routes))
    np.testing.assert_allclose(same, whole(context)[0], atol=1e-6)
    assert np.abs(changed - same).max() > 1e-3


def test_a_mesh_changes_no_forecast(forecaster: BoltForecaster) -> None:
    meshed = make_forecaster(data=2, expert=2, tensor=2)
    np.testing.assert_allclose(
        meshed.predict(some_series()), forecaster.predict(some_series()), atol=1e-5
    )


YAML = """
name: run
devices: {{simulate: 8}}
mesh: {{data: 2, expert: 4}}
model:
  {{num_layers: 1, width: 16, num_heads: 2, hidden: 16,
   forecast: {{patch: 4, decoder_layers: 2, context_length: 16, prediction_length: 8}}}}
moe: {{num_experts: 8, top_k: 2, hidden: 8, route_by: sequence}}
data:
  mixture: [{{source: {corpus}, weight: 1}}, {{source: "mixup:40", weight: 2}}]
  min_past: 4
  validation_fraction: 0.3
train: {{steps: 4, global_batch: 16, eval_every: 2, eval_batches: 1}}
checkpoint: {{every: 2, keep_last: 9}}
optimizer: {{warmup_steps: 0, schedule: constant}}
"""


def train(folder: Path, directory: Path, *overrides: str, **options: bool) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "matmul_rate", lambda *_: (1e11, "given by the test"))
        patch.setattr(training, "TrainProgram", shared_program)
        config = load_config(folder / "run.yaml", list(overrides))
        training.train(config, directory, **options)
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 80 series, and a configuration that trains on it and on mixtures of it."""
    folder, rng = tmp_path_factory.mktemp("series"), np.random.default_rng(0)
    waves = (
        np.sin(np.arange(40) / rng.uniform(1, 4)) + rng.standard_normal(40) / 9 for _ in range(80)
    )
    write_corpus(folder / "corpus", waves, {})
    (folder / "run.yaml").write_text(YAML.format(corpus=folder / "corpus"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return train(folder, folder / "run")


def test_a_run_is_a_forecaster_with_the_weights_that_were_trained(folder: Path, run: Path) -> None:
    """What it forecasts of the held-out series has the loss that the trainer measured."""
    lines = read_metrics(run / "metrics.jsonl")
    trained = [line for line in lines if "ce_loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    for layer in trained[0]["layers"]:
        assert (layer["layer"] - 1, sum(layer["load"])) in {(0, 16 * TOP_K), (1, 16 * TOP_K)}
    assert trained[0]["dropped"] == 0
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "quantile loss" in report
    assert 'alt="forecasts"' in report
    assert (run / "plots" / "forecasts.png").stat().st_size > 10_000
    corpus = open_corpus(folder / "corpus")
    settings = WindowSettings(16, 8, min_past=4, held_out=0.3)
    first = SeriesWindows([corpus], settings=settings).held_out(8)
    # The trainer's batch has mixtures in turn with these: an evaluation of one corpus is compared.
    alone = train(folder, folder / "alone", "data.mixture=[]", f"data.source={folder}/corpus")
    measured = [line for line in read_metrics(alone / "metrics.jsonl") if "val_loss" in line][-1]
    windows = SeriesWindows([corpus], settings=settings).held_out(16)
    np.testing.assert_array_equal(windows["context"][:8], first["context"])
    quantiles, _ = load_forecaster(alone).predict_quantiles([*windows["context"]], 8, LEVELS)
    errors = windows["target"][..., None] - quantiles
    losses = 2 * np.maximum(LEVELS * errors, (np.array(LEVELS) - 1) * errors).mean(axis=-1)
    wanted = (losses / windows["context"].std(axis=1, keepdims=True)).mean()
    assert measured["val_loss"] == pytest.approx(wanted, rel=1e-4)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(folder: Path, run: Path) -> None:
    stopped = train(folder, copy_until(run, folder / "stopped", 2), resume=True)
    for path in (run, stopped):
        assert len([line for line in read_metrics(path / "metrics.jsonl") if "loss" in line]) == 4
    ends = [
        [line for line in read_metrics(path / "metrics.jsonl") if "loss" in line][-1]["loss"]
        for path in (run, stopped)
    ]
    assert ends[0] == ends[1]


def test_commands_open_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{step},{np.sin(step)}\n" for step in range(30))
    (tmp_path / "waves.csv").write_text("timestamp,target\n" + rows, encoding="utf-8")
    words = ["forecast", str(run), str(tmp_path / "waves.csv"), "--horizon", "9"]
    with pytest.raises(SystemExit) as ended:
        main.main([*words, "--quantiles", "0.1,0.5,0.9"])
    out = capsys.readouterr().out.splitlines()
    assert (ended.value.code, len(out)) == (0, 10)
    assert out[0].endswith("predictions,0.1,0.5,0.9")
    with pytest.raises(SystemExit) as ended:
        main.main([*words, "--quantiles", "0.1,0.5,0.9", "--mesh", "data=2,expert=4"])
    meshed = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    for one, other in zip(out[1:], meshed[1:], strict=True):
        ours, theirs = ([*map(float, line.split(",")[-4:])] for line in (one, other))
        np.testing.assert_allclose(theirs, ours, atol=1e-5)
    with pytest.raises(SystemExit):
        main.main([*words, "--mesh", "experts=2"])
    assert "--mesh 'experts=2' cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["generate", str(run), "--prompt", "Once"])
    assert "forecasts series and writes no text" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["export", str(run), str(tmp_path / "out")])
    assert "cannot be exported" in capsys.readouterr().err
    assert json.loads((run / "environment.json").read_text())["parameters"]["total"] > 0


def test_a_mesh_that_does_not_divide_the_experts_is_refused(run: Path) -> None:
    from moe_jax.config.schema import MeshConfig
    from moe_jax.parallel.mesh import make_mesh

    with pytest.raises(UserError, match="expert=3 does not divide the 8 experts"):
        load_forecaster(run, make_mesh(MeshConfig(expert=3)))
