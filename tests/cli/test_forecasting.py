from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moe_jax.data.series.corpus import open_corpus
from moe_jax.forecasting.load import load_forecaster
from moe_jax.forecasting.tables.frames import predict_df
from tests.support import ROOT, chronos_cases
from tests.support.command import call

SHARED = ROOT.parent / "shared" / "data"
there = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")


@there
def test_seasonal_naive_scores_as_published(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data-dir", SHARED / "series", "--json")
    wanted = {"m4_hourly": (1.193210, 0.0483092), "etth": (0.9316203115, 0.1220896586)}
    given = ("--data", "m4_hourly", "--horizon", "48", "--season", "24")
    assert call("eval-forecast", "seasonal-naive", *given, *options) == 0
    scores = json.loads(capsys.readouterr().out)
    assert call("eval-forecast", "seasonal-naive", "--data", "etth", *options) == 0
    scores |= json.loads(capsys.readouterr().out)
    assert scores.keys() == wanted.keys()
    for name, (mase, wql) in wanted.items():
        assert scores[name] == pytest.approx({"MASE": mase, "WQL": wql}, rel=1e-6)
    assert scores["etth"]["MASE"] == pytest.approx(0.9316203115, abs=1e-10)


@there
def test_files_of_scores_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, baseline = (
        SHARED / "chronos" / f"{name}-zero-shot.csv"
        for name in ("chronos-t5-tiny", "seasonal-naive")
    )
    out = ("--out", tmp_path / "out.csv")
    assert call("eval-forecast", model, "--baseline", baseline, *out) == 0
    table = capsys.readouterr().out
    assert re.search(r"geometric mean of ratios +0\.87048 +0\.71089", table)
    assert re.search(r"ETTh +0\.8184\d+ +0\.0857\d+ +0\.9316203 +0\.1220897", table)
    assert pd.read_csv(tmp_path / "out.csv").columns.tolist() == ["dataset", "model", "MASE", "WQL"]
    assert call("eval-forecast", tmp_path / "out.csv", "--baseline", baseline, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["relative to baseline"] == pytest.approx(
        {"MASE": 0.8704764463925718, "WQL": 0.7108912052035352}
    )


@pytest.fixture
def table(tmp_path: Path) -> Path:
    times = pd.date_range("2026-01-01", periods=60, freq="h")
    path = tmp_path / "sales.csv"
    pd.concat(
        pd.DataFrame({"item_id": item, "timestamp": times, "target": range(60), "price": 1})
        for item in ("one", "two")
    ).to_csv(path, index=False)
    return path


def test_forecast(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = table.with_name("out.csv"), table.with_name("out.png")
    options = ("--horizon", "3", "--quantiles", "0.1,0.5,0.9")
    assert call("forecast", "seasonal-naive", table, *options, "--out", out, "--plot", plot) == 0
    assert f"forecast 2 items into {out} and {plot}" in capsys.readouterr().err
    frame = pd.read_csv(out)
    assert frame.columns.tolist() == [
        *("item_id", "timestamp", "target_name", "predictions", "0.1", "0.5", "0.9")
    ]
    assert frame["predictions"].tolist() == [36, 37, 38] * 2  # the season of hours is 24
    assert frame["timestamp"][0] == "2026-01-03 12:00:00"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert call("forecast", "seasonal-naive", table, *options, "--season", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ",".join(frame.columns) and lines[1].endswith("target,59.0,59.0,59.0,59.0")


def test_evaluation_of_a_file(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = table.with_name("scores.png")
    options = ("--data", table, "--horizon", "12", "--json", "--plot", plot)
    assert call("eval-forecast", "seasonal-naive", *options) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    scores = json.loads(capsys.readouterr().out)["sales"]
    # A line: a day later everything is 24 more, and so is every error.
    assert scores == pytest.approx({"MASE": 1.0, "WQL": 24 / 53.5})


@pytest.mark.parametrize(
    "command,words,sentence",
    [
        ("forecast", [], "--horizon is missing"),
        ("forecast", ["--horizon", "3", "--quantiles", "0.5,1"], "--quantiles '0.5,1'"),
        ("forecast", ["--horizon", "3", "--quantiles", "a"], "--quantiles 'a' cannot be read"),
        ("forecast", ["--horizon", "3", "--id", "shop"], "'shop': name another with --id; it has"),
        ("forecast", ["--horizon", "3", "--target", "sold"], "'sold': name another with --target"),
        ("forecast", ["--horizon", "3", "--freq", "x"], "--freq 'x' is no frequency"),
        ("forecast", ["--horizon", "3", "--layout", "tall"], "--layout"),
        ("forecast", ["--horizon", "3", "--out", "no/x.csv"], "--out no/x.csv: there is no folder"),
        ("forecast", ["--horizon", "3", "--out", "FOLDER"], "is a folder: name a file"),
        ("forecast", ["--horizon", "3", "--out", "TABLE"], "sales.csv is DATA too: name another"),
        ("forecast", ["--horizon", "3", "--future", "TABLE"], "has the target 'target'"),
        (
            "forecast",
            ["--horizon", "3", "--out", "x.csv", "--plot", "x.csv"],
            "--plot x.csv is --out too",
        ),
        ("forecast", ["--horizon", "2000000"], "--horizon 2000000 is more than the 1,000,000"),
        ("forecast", ["--horizon", "3", "--target", "price,price"], "names a column twice"),
        ("eval-forecast", ["--data", "TABLE", "--out", "TABLE"], "sales.csv is --data"),
        ("eval-forecast", ["--data", "TABLE", "--plot", "no/x.png"], "--plot no/x.png: there is"),
        (
            "eval-forecast",
            ["--data", "TABLE", "--data", "TABLE", "--horizon", "3"],
            "--data names two data sets 'sales'",
        ),
        ("eval-forecast", [], "--data is missing"),
        ("eval-forecast", ["--data", "etth"], "ETTh1.csv is not there: --data-dir names"),
        ("eval-forecast", ["--data", "TABLE"], "has no horizon of its own: give --horizon"),
        ("eval-forecast", ["--data", "TABLE", "--horizon", "60"], "(row 1) has 60 values"),
    ],
)
def test_mistakes(
    command: str, words: list[str], sentence: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"TABLE": str(table), "FOLDER": str(table.parent)}
    words = [places.get(word, word) for word in words]
    before = sorted(table.parent.iterdir()), table.read_bytes()
    data = [table] if command == "forecast" else []
    assert call(command, "seasonal-naive", *data, *words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("moe-jax: ") and error.count("\n") == 1
    assert (sorted(table.parent.iterdir()), table.read_bytes()) == before


def test_gaps(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:70] + lines[71:]))
    options = ("--horizon", "3", "--out", table.with_name("out.csv"))
    assert call("forecast", "seasonal-naive", table, *options) == 2
    error = capsys.readouterr().err
    assert "item 'two' has a gap before row 70" in error and "or give --fill-gaps." in error
    assert not table.with_name("out.csv").exists()
    assert call("forecast", "seasonal-naive", table, *options, "--fill-gaps") == 0
    stored = table.with_name("stored")
    for command in (
        ("eval-forecast", "seasonal-naive", "--data", table, "--horizon", "3"),
        ("data", "series", table, stored),
    ):
        assert call(*command) == 2
        assert "item 'two' has a gap before row 70" in capsys.readouterr().err
        assert not stored.exists()
        assert call(*command, "--fill-gaps") == 0


def test_corpora(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a file, from kernels, and mixed of both; the same seed gives the same."""
    folder = table.parent
    assert call("data", "series", table, folder / "stored", "--target", "target,price") == 0
    assert "4 series in" in capsys.readouterr().out
    plot = folder / "kernel.png"
    made = ("--series", "4", "--length", "64", "--seed", "3")
    assert call("synth", "kernel", *made, "--out", folder / "kernel", "--plot", plot) == 0
    assert "4 series in" in capsys.readouterr().err and plot.read_bytes().startswith(b"\x89PNG")
    lengths = ("--min-length", "20", "--max-length", "50")
    sources = ("--source", folder / "stored", "--source", folder / "kernel")
    for name in ("mixed", "again"):
        options = (*sources, *lengths, "--series", "9", "--out", folder / name)
        assert call("synth", "mixup", *options) == 0
    mixed, again = (open_corpus(folder / name) for name in ("mixed", "again"))
    assert len(mixed) == 9 and 20 <= mixed.lengths().min() <= mixed.lengths().max() <= 50
    for number in range(9):
        np.testing.assert_array_equal(mixed[number], again[number])
    capsys.readouterr()
    for words, sentence in (
        (("kernel", "--out", folder / "kernel"), "kernel exists already"),
        (
            ("mixup", *sources, "--max-length", "9", "--out", folder / "x"),
            "--max-length 9 is less than --min-length 128",
        ),
        (("mixup", "--source", folder, "--out", folder / "x"), "is no corpus of series"),
        (("mixup", *sources, "--out", folder / "x"), "source 1 has no series of 128 values"),
    ):
        assert call("synth", *words) == 2
        assert sentence in capsys.readouterr().err
    assert not (folder / "x").exists()
    assert call("synth", "kernel", "--out", folder / "x", "--plot", folder / "no" / "x.png") == 2
    assert "there is no folder" in capsys.readouterr().err and not (folder / "x").exists()
    for content in ("{", "{}", "[]"):
        (folder / "stored" / "series.json").write_text(content)
        assert call("synth", "mixup", *sources, "--out", folder / "x") == 2
        assert "stored is not whole" in capsys.readouterr().err


def test_a_chronos_model_forecasts(
    table: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the Python API does; covariates that it does not read are named."""
    folder = chronos_cases.build("bolt", tmp_path_factory.mktemp("bolt"))
    options = ("--horizon", "3", "--quantiles", "0.1,0.5")
    assert call("forecast", folder, table, *options) == 0
    written = capsys.readouterr()
    assert "MODEL reads no covariates; ignored: price." in written.err
    frame = pd.read_csv(io.StringIO(written.out))
    own = predict_df(
        load_forecaster(folder), pd.read_csv(table), prediction_length=3, quantile_levels=[0.1, 0.5]
    )
    assert frame.columns.tolist() == own.columns.tolist() and len(frame) == 6
    np.testing.assert_allclose(frame[["predictions", "0.1"]], own[["predictions", "0.1"]], 1e-5)
