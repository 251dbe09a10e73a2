"""Files that are no tables of series, or nearly: one sentence, whichever layout is asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_jax.errors import UserError
from moe_jax.forecasting.evaluate import evaluation_set, read_scores
from moe_jax.forecasting.seasonal_naive import SeasonalNaive
from moe_jax.forecasting.tables.frames import MOST_STEPS, predict_df
from moe_jax.forecasting.tables.items import SeriesItem, regular_items
from moe_jax.forecasting.tables.read import Columns, read_series

HEADER = "item_id,timestamp,target\n"
TIMES = pd.date_range("2026-01-01", periods=6, freq="h")


def frame() -> pd.DataFrame:
    rows = {"timestamp": TIMES, "target": np.arange(6.0)}
    return pd.concat(pd.DataFrame({"item_id": name, **rows}) for name in "ab").reset_index(
        drop=True
    )


def items(path: Path, columns: Columns = Columns(), layout: str = "auto") -> dict[Any, SeriesItem]:  # noqa: B008
    series = regular_items(read_series(path, columns, layout).items)
    return {item.name: item for item, _ in series}


NO_TABLE = r"cannot be read as a table \(.*\): give CSV or parquet"
FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.csv", b"", NO_TABLE),
    "blank": ("a.csv", b"\n\n", NO_TABLE),
    "binary": ("a.csv", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), NO_TABLE),
    "another encoding": ("a.csv", (HEADER + "Zürich,2026-01-01,1\n").encode("latin-1"), NO_TABLE),
    "zeros": ("a.csv", bytes(500), "has no rows"),
    "no gzip": ("a.csv.gz", HEADER.encode(), NO_TABLE),
    "broken gzip": ("a.csv.gz", b"\x1f\x8bjunk and more junk", NO_TABLE),
    "no zip": ("a.csv.zip", b"junk", NO_TABLE),
    "no parquet": ("a.parquet", HEADER.encode(), NO_TABLE),
    "header alone": ("a.csv", HEADER.encode(), "has no rows"),
    "too many cells": ("a.csv", f"{HEADER}a,1,1\na,2,1,5\n".encode(), NO_TABLE),
    "cells beyond the header": ("a.csv", f"{HEADER}a,1,1,5\n".encode(), "more cells in a row than"),
    "two columns": ("a.csv", b"item_id,timestamp,target,target\na,1,2,3\n", "two columns 'target'"),
    "semicolons": ("a.csv", b"item_id;timestamp;target\na;1;2\n", "has no series: a wide table"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_tables(case: str, tmp_path: Path) -> None:
    name, content, sentence = FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        items(path)


ROWS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has no rows"),
    "header alone": (b"V1,V2,V3\n", "has no rows"),
    "binary": (b"\x89PNG\r\n", NO_TABLE),
    "text in the first row": (b"a,1,x,3\nb,1,2\n", "item 'a' has 'x' for a number in row 1 of"),
    "text below a header": (b"id,V\na,1\nb,q\n", "item 'b' has 'q' for a number in row 2 of"),
    "infinite": (b"a,1,2\nb,1,inf\n", "item 'b' has inf in row 2"),
    "twice": (b"a,1,2\na,3,4\n", "item 'a' is there twice, again in row 2"),
    "nothing": (b"a,1\nb,,\n", "item 'b' in row 2 has no value"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_are_no_series(case: str, tmp_path: Path) -> None:
    content, sentence = ROWS[case]
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        items(path, layout="rows")


def test_short_rows_count_steps(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,1\nb,2\n")
    assert [item.target.tolist() for item in items(path, layout="rows").values()] == [[[1]], [[2]]]


def test_parquet_as_pandas_writes_it(tmp_path: Path) -> None:
    """An index is a column, the first of a wide table; one without a name is none."""
    path = tmp_path / "a.parquet"
    frame().set_index("timestamp").to_parquet(path)
    assert items(path)["b"].times.tolist() == [*TIMES]
    frame().pivot(index="timestamp", columns="item_id", values="target").to_parquet(path)
    assert items(path)["b"].times.tolist() == [*TIMES]
    frame().iloc[1:].to_parquet(path)
    assert items(path)["b"].covariates == {}
    frame().to_csv(tmp_path / "a.csv")
    assert read_series(tmp_path / "a.csv", Columns()).covariates == ()
    frame().iloc[:0].to_parquet(path)
    with pytest.raises(UserError, match="has no rows"):
        items(path)
    pd.DataFrame({"item_id": ["a"], "timestamp": TIMES[:1], "target": [[1.0]]}).to_parquet(path)
    with pytest.raises(UserError, match=r"has list<.*> in each cell of column 'target'"):
        items(path)
    frame().assign(target=frame()["timestamp"]).to_parquet(path)
    with pytest.raises(UserError, match="'2026-01-01 00:00:00' for a number in row 1"):
        items(path)


def test_the_times_of_a_wide_table_may_be_any_column(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    pd.DataFrame({"a": range(6), "when": TIMES, "b": range(6)}).to_csv(path, index=False)
    found = items(path, Columns(timestamp="when"))
    assert list(found) == ["a", "b"] and found["a"].times.tolist() == [*TIMES]


@pytest.mark.parametrize(
    ("times", "options", "sentence"),
    [
        (TIMES, {"prediction_length": MOST_STEPS + 1}, "is more than the 1,000,000 steps"),
        (pd.to_datetime([f"{year}-01-01" for year in range(9990, 9996)]), {}, "no time can be"),
        (
            2**63 - 1 - np.arange(5, -1, -1),
            {},
            r"in row 6, and prediction_length=300000 steps of 1",
        ),
        (np.arange(6), {"freq": "h"}, r"whole numbers for times \(row 1\), which count steps"),
    ],
)
def test_horizons_beyond_the_calendar(times: Any, options: dict[str, Any], sentence: str) -> None:
    table = pd.DataFrame({"item_id": "a", "timestamp": times, "target": 1.0})
    with pytest.raises(UserError, match=sentence):
        predict_df(SeasonalNaive(1), table, **{"prediction_length": 300_000, **options})


def future(**columns: Any) -> pd.DataFrame:
    ahead = TIMES[-1] + pd.to_timedelta([1, 2], "h")
    return pd.concat(pd.DataFrame({"item_id": name, "timestamp": ahead}) for name in "ab").assign(
        **columns
    )


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (
            future(price=[1.0, 2.0, 3.0, "dear"]),
            "item 'b' has 'dear' for a number in row 4, column",
        ),
        (future(price=[1.0, np.inf, 3.0, 4.0]), "item 'a' has inf in row 2, column 'price'"),
        (future(price=1.0).iloc[[0, 0, 2, 3]], "item 'a' has the time 2026-01-01 06:00:00 twice"),
        (future(price=1.0).iloc[:0], "has no rows"),
    ],
)
def test_what_is_wrong_with_a_future_is_said_of_it(table: pd.DataFrame, sentence: str) -> None:
    past = frame().assign(price=1.0)
    with pytest.raises(UserError, match=f"^the future frame:? .*{re.escape(sentence)}"):
        predict_df(SeasonalNaive(1), past, table, prediction_length=2)


def test_missing_and_logical_values_of_a_future_are_numbers() -> None:
    past = frame().assign(price=1.0, open=[1, 0] * 6)
    ahead = future(price=[None] * 4, open=[True, False] * 2)
    assert len(predict_df(SeasonalNaive(1), past, ahead, prediction_length=2)) == 4


def test_an_evaluation_refuses_what_a_forecast_does(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    frame().drop(index=9).to_csv(path, index=False)
    with pytest.raises(UserError, match="item 'b' has a gap before row 10"):
        list(evaluation_set(str(path), tmp_path, horizon=2).open())
    filled = evaluation_set(str(path), tmp_path, horizon=2, fill_gaps=True).open()
    assert [len(one.history) for one in filled] == [4, 4]


@pytest.mark.parametrize(
    ("train", "test", "sentence"),
    [
        (
            "a,1\nb,1\n",
            "a,1,2\n",
            r"train\.csv has the series 'b' in row 2, and .*test\.csv has not",
        ),
        (
            "a,1\n",
            "a,1,2\nb,1,2\n",
            r"test\.csv has the series 'b' in row 2, and .*train\.csv has not",
        ),
        ("a,1\n", "b,1\n", r"test\.csv has the series 'b' in row 1, and .*train\.csv has not"),
        ("a,inf\n", "a,1\n", "item 'a' has inf in row 1"),
        ("a,1\n", "a,1\n", "a has 1 values: give --horizon 1"),
    ],
)
def test_files_of_m4_must_correspond(train: str, test: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "m4_hourly_train.csv").write_text(train)
    (tmp_path / "m4_hourly_test.csv").write_text(test)
    with pytest.raises(UserError, match=sentence):
        list(evaluation_set("m4_hourly", tmp_path, horizon=2).open())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"dataset,model,MASE,WQL\nx,y,1\n", "line 2: could not convert"),
        (b"\x89PNG", "line 0: 'utf-8' codec"),
        (b"", "has no column MASE, WQL, dataset"),
        (None, "is no file: give a CSV file of scores"),
    ],
)
def test_files_that_hold_no_scores(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_scores(path)
