from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_jax.errors import UserError
from moe_jax.forecasting.seasonal_naive import SeasonalNaive
from moe_jax.forecasting.tables import read
from moe_jax.forecasting.tables.forecast_file import forecast_file
from moe_jax.forecasting.tables.frames import ForecastSettings, predict_df
from moe_jax.forecasting.tables.items import regular_items
from moe_jax.forecasting.tables.read import Columns, items_of_long, read_series
from moe_jax.forecasting.tables.steps import inferred_steps, named_steps

TIMES = {
    "h": pd.date_range("2026-01-31 20:00", periods=6, freq="h"),
    "D": pd.date_range("2026-02-25", periods=6, freq="D"),
    "MS": pd.date_range("2025-10-01", periods=6, freq="MS"),
}


class Recorder:
    """A forecaster that keeps what it is given and forecasts the number of the series."""

    context_length = None
    prediction_length = 3
    quantiles = ()

    def __init__(self, multivariate: bool):
        self.multivariate, self.inputs, self.calls = multivariate, [], []

    def predict_quantiles(
        self, inputs: Sequence[Any], prediction_length: int, quantile_levels: Any, **options: Any
    ) -> Any:
        self.inputs += inputs
        self.calls.append((len(inputs), options["first_series"]))
        first = options["first_series"]
        shapes = [
            (*np.shape(one["target"] if isinstance(one, dict) else one)[:-1], prediction_length)
            for one in inputs
        ]
        means = [np.full(shape, first + place) for place, shape in enumerate(shapes)]
        return [np.stack([mean - 0.5, mean + 0.5], axis=-1) for mean in means], means


def long_frame(freq: str = "h", items: str = "ba") -> pd.DataFrame:
    return pd.concat(
        pd.DataFrame(
            {"item_id": item, "timestamp": TIMES[freq], "target": np.arange(6.0) + 10 * place}
        )
        for place, item in enumerate(items)
    ).reset_index(drop=True)


@pytest.mark.parametrize("freq", TIMES)
def test_forecasts_have_the_columns_and_order_of_predict_df(freq: str) -> None:
    forecast = predict_df(
        SeasonalNaive(2), long_frame(freq), prediction_length=3, quantile_levels=[0.1, 0.5]
    )
    assert list(forecast.columns) == [
        *("item_id", "timestamp", "target_name", "predictions", "0.1", "0.5")
    ]
    assert forecast["item_id"].tolist() == ["b"] * 3 + ["a"] * 3
    offset = pd.tseries.frequencies.to_offset(freq)
    ahead = [TIMES[freq][-1] + step * offset for step in (1, 2, 3)]
    assert forecast["timestamp"].tolist() == ahead * 2
    assert forecast["predictions"].tolist() == [4, 5, 4, 14, 15, 14]
    assert set(forecast["target_name"]) == {"target"}


def test_rows_of_items_may_be_mixed_and_order_is_that_of_appearance() -> None:
    frame = long_frame().sort_values(["timestamp", "item_id"], ascending=[True, False])
    whole = predict_df(SeasonalNaive(2), long_frame(), prediction_length=3)
    pd.testing.assert_frame_equal(predict_df(SeasonalNaive(2), frame, prediction_length=3), whole)


def test_covariates_and_several_targets_are_given_as_chronos_2_has_them() -> None:
    frame = long_frame().assign(other=1.0, weather="wet", price=np.arange(12), closed=True)
    ahead = TIMES["h"][-1] + pd.to_timedelta([1, 2, 3], "h")
    future = pd.concat(
        pd.DataFrame({"item_id": item, "timestamp": ahead, "weather": "dry"}) for item in "ab"
    )
    model = Recorder(multivariate=True)
    forecast = predict_df(
        model, frame, future, target=["target", "other"], quantile_levels=[0.1, 0.9]
    )
    task = model.inputs[1]
    np.testing.assert_array_equal(task["target"], [np.arange(10.0, 16), np.ones(6)])
    assert task["past_covariates"].keys() == {"weather", "price", "closed"}
    np.testing.assert_array_equal(task["past_covariates"]["price"], np.arange(6.0, 12))
    assert task["past_covariates"]["weather"].tolist() == ["wet"] * 6
    assert task["past_covariates"]["closed"].tolist() == [True] * 6
    assert task["future_covariates"]["weather"].tolist() == ["dry"] * 3
    assert task["future_covariates"].keys() == {"weather"}
    assert forecast["target_name"].tolist() == (["target"] * 3 + ["other"] * 3) * 2
    assert forecast["predictions"].tolist() == [0] * 6 + [1] * 6
    assert forecast["0.9"].tolist() == [0.5] * 6 + [1.5] * 6


def test_a_model_of_one_variable_gets_it_alone() -> None:
    model = Recorder(multivariate=False)
    frame = long_frame().assign(price=1.0)
    predict_df(model, frame, batch_size=1, quantile_levels=[0.1, 0.9])
    assert model.calls == [(1, 0), (1, 1)]
    np.testing.assert_array_equal(model.inputs[1], np.arange(10.0, 16))
    with pytest.raises(UserError, match="takes one: name one"):
        predict_df(model, frame, target=["target", "price"])
    with pytest.raises(UserError, match="reads no covariates"):
        predict_df(model, frame, frame[["item_id", "timestamp", "price"]])


def without(row: int) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda frame: frame.drop(index=row)


def cell(row: int, column: str, value: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.astype({column: object})
        frame.loc[row, column] = value
        return frame

    return change


DAILY = long_frame("D").iloc[6:].reset_index(drop=True)

BAD = {
    "missing target": (
        lambda frame: frame.drop(columns="target"),
        "no column 'target': name another with target; it has item_id, timestamp",
    ),
    "missing id": (lambda frame: frame.drop(columns="item_id"), "no column 'item_id'"),
    "gap": (
        without(3),
        "item 'b' has a gap before row 4: 2026-02-01 00:00:00 follows 2026-01-31 22:00:00",
    ),
    "gap later": (without(9), "item 'a' has a gap before row 10: 2026-02-01 00:00:00"),
    "twice": (
        lambda frame: pd.concat([frame.iloc[:3], frame.iloc[2:]]),
        "item 'b' has the time 2026-01-31 22:00:00 twice, in rows 3 and 4",
    ),
    "unsorted": (
        lambda frame: frame.iloc[[0, 2, 1, 3, 4, 5, 6]],
        "item 'b' goes back in time in row 3, from 2026-01-31 22:00:00 to 2026-01-31 21:00:00",
    ),
    "two frequencies": (
        lambda frame: pd.concat([frame.iloc[:6], DAILY]),
        "item 'a' has steps of D from row 7, and item 'b' of h",
    ),
    "infinite": (
        cell(8, "target", np.inf),
        "item 'a' has inf in row 9, column 'target'",
    ),
    "beyond f32": (cell(8, "target", -1e39), "item 'a' has -1e+39 in row 9"),
    "text": (cell(8, "target", "many"), "item 'a' has 'many' for a number in row 9"),
    "no time": (cell(1, "timestamp", "soon"), "item 'b' has 'soon' for a time in row 2"),
    "no id": (cell(7, "item_id", None), "the frame has no 'item_id' in row 8"),
    "nothing observed": (
        lambda frame: frame.assign(target=[1.0] * 6 + [np.nan] * 6),
        "item 'a' has no value in column 'target' (its first row is 7)",
    ),
    "too short": (
        lambda frame: frame.iloc[[0, 1, 6]],
        "item 'b' (row 1) has 2 of the three times that tell a frequency, and no item has more",
    ),
    "too near": (
        lambda frame: frame.iloc[[0, 1, 3, 5]],
        "item 'b' has 2026-01-31 21:00:00 in row 2, less than a step of 2h after",
    ),
    "irregular": (
        lambda frame: frame.iloc[[0, 2, 5]],
        "item 'b' has no equal steps of time (rows 1 to 3)",
    ),
    "gap of three": (
        lambda frame: frame.iloc[[0, 1, 3]],
        "item 'b' has a gap before row 3: 2026-01-31 23:00:00 follows 2026-01-31 21:00:00",
    ),
    "empty": (lambda frame: frame.iloc[:0], "the frame has no rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_refused_with_item_and_row(case: str) -> None:
    change, sentence = BAD[case]
    with pytest.raises(UserError, match=re.escape(sentence)):
        predict_df(SeasonalNaive(2), change(long_frame()), prediction_length=3)


def future_frame() -> pd.DataFrame:
    ahead = TIMES["h"][-1] + pd.to_timedelta([1, 2, 3], "h")
    return pd.concat(
        pd.DataFrame({"item_id": item, "timestamp": ahead, "price": 1.0}) for item in "ab"
    ).reset_index(drop=True)


BAD_FUTURES = {
    "too few": (without(4), "has 2 rows of item 'b' (from row 4), and the horizon is 3"),
    "no rows": (lambda f: f[f["item_id"] == "a"], "has no rows of item 'b': add 3"),
    "other item": (
        lambda f: pd.concat([f, f.iloc[:3].assign(item_id="z")]),
        "has item 'z' in row 7, which has no past",
    ),
    "other times": (
        lambda f: f.assign(timestamp=f["timestamp"] + pd.Timedelta(hours=1)),
        "has item 'b' at 2026-02-01 03:00:00 in row 4, where the forecast is for 2026-02-01 02",
    ),
    "targets": (lambda f: f.assign(target=0.0), "has the target 'target'"),
    "unknown": (lambda f: f.assign(wind=0.0), "has the covariate 'wind', of which the past"),
    "no covariate": (lambda f: f.drop(columns="price"), "has no covariate"),
    "no time": (lambda f: f.drop(columns="timestamp"), "has no column 'timestamp'"),
}


@pytest.mark.parametrize("case", BAD_FUTURES)
def test_bad_futures_are_refused(case: str) -> None:
    change, sentence = BAD_FUTURES[case]
    with pytest.raises(UserError, match=re.escape(sentence)):
        predict_df(
            Recorder(multivariate=True),
            long_frame().assign(price=0.0),
            change(future_frame()),
            quantile_levels=[0.1, 0.9],
        )


def test_gaps_are_filled_where_that_is_asked_for() -> None:
    model = Recorder(multivariate=True)
    frame = long_frame().assign(weather="wet").drop(index=[2, 3])
    predict_df(model, frame, fill_gaps=True, quantile_levels=[0.1, 0.9])
    np.testing.assert_array_equal(model.inputs[0]["target"], [[0, 1, np.nan, np.nan, 4, 5]])
    weather = model.inputs[0]["past_covariates"]["weather"]
    assert weather.tolist() == ["wet", "wet", None, None, "wet", "wet"]
    off = cell(4, "timestamp", pd.Timestamp("2026-02-01 00:30"))(long_frame())
    with pytest.raises(UserError, match=r"00:30:00 in row 5, which is not on the grid of h"):
        predict_df(model, off, fill_gaps=True, quantile_levels=[0.1, 0.9])


def test_a_frequency_that_is_given_is_not_compared() -> None:
    short = long_frame("D").iloc[[0, 1, 6]]
    forecast = predict_df(SeasonalNaive(1), short, prediction_length=1, freq="D")
    assert forecast["timestamp"].tolist() == [TIMES["D"][2], TIMES["D"][1]]
    holes = long_frame("D").drop(index=2)
    assert len(predict_df(SeasonalNaive(1), holes, prediction_length=1, freq="B")) == 2
    for freq in ("sometimes", "-1h"):
        with pytest.raises(UserError, match=f"freq='{freq}'"):
            predict_df(SeasonalNaive(1), short, prediction_length=1, freq=freq)


def test_short_items_wait_for_the_steps_of_others() -> None:
    frame = long_frame(items="cba").iloc[[0, 1, *range(6, 18)]]
    forecast = predict_df(SeasonalNaive(1), frame, prediction_length=1)
    assert forecast["item_id"].tolist() == ["c", "b", "a"]
    assert forecast["timestamp"][0] == TIMES["h"][2]


def test_whole_numbers_count_steps() -> None:
    frame = long_frame().assign(timestamp=[*range(2000, 2012, 2)] * 2)
    forecast = predict_df(SeasonalNaive(1), frame, prediction_length=2)
    assert forecast["timestamp"].tolist() == [2012, 2014] * 2
    with pytest.raises(UserError, match="gap before row 4: 2008 follows 2004"):
        predict_df(SeasonalNaive(1), frame.drop(index=3), prediction_length=2)


@pytest.mark.parametrize(
    "freq,season",
    [
        *(("h", 24), ("15min", 96), ("30min", 48), ("7h", 1), ("s", 3600), ("D", 1), ("W", 1)),
        *(("W-WED", 1), ("B", 5), ("MS", 12), ("ME", 12), ("QE", 4), ("QS", 4), ("YE", 1)),
        *(("2MS", 6),),
    ],
)
def test_seasons(freq: str, season: int) -> None:
    assert named_steps(freq).season == season
    inferred = inferred_steps(pd.date_range("2026-01-01", periods=10, freq=freq))
    assert inferred is not None and inferred.season == season


# Files


def items(path: Path, columns: Columns = Columns(), layout: str = "auto") -> dict[str, Any]:  # noqa: B008
    return {item.name: item for item in read_series(path, columns, layout).items}


def test_layouts(tmp_path: Path) -> None:
    wide = long_frame().pivot(index="timestamp", columns="item_id", values="target")
    wide.loc[wide.index[:2], "a"] = np.nan  # a begins later
    wide.to_csv(tmp_path / "wide.csv")
    (tmp_path / "rows.csv").write_text('"V1","V2"\n"a","1","2",,"4",,\n\n"b","5"\n')
    long_frame().assign(item_id=["007"] * 6 + ["08"] * 6).to_csv(tmp_path / "l.csv", index=False)
    long_frame().to_parquet(tmp_path / "l.parquet")
    one = long_frame(items="b").drop(columns="item_id").rename(columns={"timestamp": "when"})
    one.to_csv(tmp_path / "single.csv", index=False)

    found = items(tmp_path / "wide.csv")
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["a"].target, [[12, 13, 14, 15]])
    assert found["a"].times[0] == TIMES["h"][2] and found["a"].rows[0] == 3
    assert list(items(tmp_path / "wide.csv", Columns(targets=("b",)), "wide")) == ["b"]
    rows = items(tmp_path / "rows.csv", layout="rows")
    np.testing.assert_array_equal(rows["a"].target, [[1, 2, np.nan, 4]])
    assert rows["b"].times.tolist() == [1]
    assert list(items(tmp_path / "l.csv")) == ["007", "08"]  # ids are text
    np.testing.assert_array_equal(items(tmp_path / "l.parquet")["a"].target, [np.arange(10.0, 16)])
    assert items(tmp_path / "single.csv")["single"].times.tolist() == list(TIMES["h"])
    several = items(tmp_path / "wide.csv", Columns(targets=("a", "b")))["wide"]
    assert several.targets.keys() == {"a", "b"}


def test_files_are_read_and_written_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of 4 rows give the same as the whole, to CSV and to parquet."""
    path, frame = tmp_path / "in.csv", long_frame(items="dcba")
    frame.to_csv(path, index=False)
    settings = ForecastSettings(levels=(0.1, 0.9), batch_size=3)
    whole = forecast_file(
        lambda steps: Recorder(False),
        path,
        tmp_path / "whole.csv",
        settings,
        horizon=2,
        columns=Columns(),
    )
    assert whole.items == 4 and [one.item.name for one in whole.drawn] == ["d", "c", "b", "a"]
    monkeypatch.setattr(read, "WHOLE_BYTES", 0)
    monkeypatch.setattr(read, "_PIECE_ROWS", 4)
    for name in ("pieces.csv", "pieces.parquet"):
        model = Recorder(False)
        forecast_file(
            lambda steps, model=model: model,
            path,
            tmp_path / name,
            settings,
            horizon=2,
            columns=Columns(),
        )
        assert model.calls == [(3, 0), (1, 3)]
    text = (tmp_path / "whole.csv").read_text()
    assert (tmp_path / "pieces.csv").read_text() == text
    written = pd.read_parquet(tmp_path / "pieces.parquet")
    assert written.to_csv(index=False) == text
    frame.sort_values("timestamp", kind="stable").to_csv(path, index=False)
    with pytest.raises(UserError, match="item 'd' goes on in row 5 after other items"):
        items(path)


def test_nothing_is_left_of_a_forecast_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    long_frame().drop(index=9).to_csv(path, index=False)
    with pytest.raises(UserError, match="gap before row 10"):
        forecast_file(
            lambda steps: SeasonalNaive(1),
            path,
            tmp_path / "out.csv",
            ForecastSettings(batch_size=1),
            horizon=2,
            columns=Columns(),
        )
    assert [file.name for file in tmp_path.iterdir()] == ["in.csv"]


@pytest.mark.parametrize(
    "content,sentence",
    [
        ("", "cannot be read as a table"),
        ("id,time,value\nx,2026-01-01,1\n", "item 'id' has 'x' for a time in row 1"),
        ("timestamp,target\n2026-01-01,1\n2026-01-01,2\n", "taken for one item, as no id_column"),
    ],
)
def test_bad_files(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(sentence)):
        items(path)
    with pytest.raises(UserError, match="no file: give"):
        items(tmp_path / "other.csv")


def test_an_item_of_many_rows_costs_no_more_per_row() -> None:
    """The regularity of a long series is one comparison of arrays, at fixed and calendar steps."""
    times = pd.date_range("2000-01-01", periods=200_000, freq="h")
    frame = pd.DataFrame({"item_id": "a", "timestamp": times, "target": 1.0})
    columns = Columns("item_id", "timestamp", ("target",))
    found = list(regular_items(items_of_long([frame], columns, "it")))
    assert len(found) == 1 and found[0].steps.name == "h"
