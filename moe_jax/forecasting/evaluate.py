"""Evaluation: forecasts of the last values of each series of a data set, and their scores.

A data set is `m4_hourly` or `etth`, read from a folder that holds the published files, or a file of
series. Series are read, forecast and scored `batch_size` at a time.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from moe_jax.errors import UserError
from moe_jax.forecasting.forecaster import Forecaster
from moe_jax.forecasting.metrics import (
    METRICS,
    PAPER_LEVELS,
    ForecastScores,
    Scores,
    relative_scores,
)
from moe_jax.forecasting.tables.items import RegularItem, regular_items
from moe_jax.forecasting.tables.read import Columns, read_series
from moe_jax.forecasting.tables.steps import named_steps


class HeldOut(NamedTuple):
    """A series whose last values are known and not shown."""

    name: str
    history: np.ndarray
    """[T]"""
    label: np.ndarray
    """[H]"""


class EvaluationSet(NamedTuple):
    """A data set and how it is scored."""

    name: str
    horizon: int
    season: int
    open: Callable[[], Iterator[HeldOut]]
    """Its series, from the first; they may be read as often as one likes."""


_DEFAULT = Columns()
HORIZONS = {"m4_hourly": 48, "etth": 24}
"""Of the published scores."""


def evaluation_set(
    data: str,
    folder: Path,
    *,
    horizon: int | None = None,
    season: int | None = None,
    columns: Columns = _DEFAULT,
    layout: str = "auto",
    freq: str | None = None,
    fill_gaps: bool = False,
) -> EvaluationSet:
    """The data set of a name, or of a file. Both published ones are hourly: their season is 24.

    Raises UserError for a file that is missing, and a horizon that is neither given nor published.
    """
    steps = None if freq is None else named_steps(freq)

    def items(path: Path, columns: Columns, layout: str) -> Iterator[RegularItem]:
        series = read_series(path, columns, layout).items
        return regular_items(series, steps, fill_gaps=fill_gaps)

    horizon = horizon or HORIZONS.get(data)
    if horizon is None:
        raise UserError(f"--data {data} has no horizon of its own: give --horizon.")
    if data == "m4_hourly":
        train, test = (_file(folder, f"m4_hourly_{part}.csv") for part in ("train", "test"))
        return EvaluationSet(data, horizon, season or 24, lambda: _m4(train, test, horizon))
    if data == "etth":
        paths = [_file(folder, f"ETTh{number}.csv") for number in (1, 2)]
        return EvaluationSet(
            data,
            horizon,
            season or 24,
            lambda: _last(((path, items(path, Columns(), "wide")) for path in paths), horizon),
        )
    path = Path(data)
    if season is None:
        season = (steps or next(items(path, columns, layout)).steps).season
    return EvaluationSet(
        path.stem, horizon, season, lambda: _last([(path, items(path, columns, layout))], horizon)
    )


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is not there: --data-dir names the folder that holds {name}.")
    return path


def _m4(train: Path, test: Path, horizon: int) -> Iterator[HeldOut]:
    """The series of two files of the M4 competition, whose rows correspond."""
    files = (read_series(path, Columns(), "rows").items for path in (train, test))
    for before, after in itertools.zip_longest(*files):
        if before is None or after is None or before.name != after.name:
            there, missing = (train, test) if after is None else (test, train)
            one = before if after is None else after
            raise UserError(
                f"{there} has the series {one.name!r} in row {one.rows[0]}, and {missing} has not: "
                f"take both from one M4."
            )
        if len(after.times) < horizon:
            count = len(after.times)
            raise UserError(f"{test}: {after.name} has {count} values: give --horizon {count}.")
        yield HeldOut(str(before.name), before.target[0], after.target[0, :horizon])


def _last(tables: Iterable[tuple[Path, Iterable[RegularItem]]], horizon: int) -> Iterator[HeldOut]:
    """Each target of each item of tables, and its last values for a label."""
    for path, items in tables:
        for item, _ in items:
            if len(item.times) <= horizon:
                raise UserError(
                    f"item {item.name!r} of {path} (row {item.rows[0]}) has {len(item.times)} "
                    f"values, and the last {horizon} are held out: give a shorter --horizon, or "
                    f"leave it out."
                )
            for values in item.targets.values():
                yield HeldOut(str(item.name), values[:-horizon], values[-horizon:])


def evaluate_forecaster(
    forecaster: Forecaster,
    data: EvaluationSet,
    *,
    batch_size: int = 256,
    num_samples: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda series: None,
) -> ForecastScores:
    """The scores over the levels of the papers; `progress` is told the number of series so far."""
    sums = ForecastScores(PAPER_LEVELS, data.season)
    unread = data.open()
    while batch := list(itertools.islice(unread, batch_size)):
        quantiles, _ = forecaster.predict_quantiles(
            [one.history for one in batch],
            data.horizon,
            PAPER_LEVELS,
            batch_size=batch_size,
            num_samples=num_samples,
            seed=seed,
            first_series=sums.series,
        )
        for one, own in zip(batch, quantiles, strict=True):
            forecast = np.asarray(own).reshape(data.horizon, len(PAPER_LEVELS))
            sums.add(one.history, one.label, forecast)
        progress(sums.series)
    if not sums.series:
        raise UserError(f"{data.name} has no series.")
    return sums


# Files of scores, as Chronos' repository has them


def read_scores(path: Path) -> dict[str, Scores]:
    """The scores of each data set in a CSV file with the columns dataset, MASE and WQL. Raises
    UserError for a file that is none.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: give a CSV file of scores.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            names = rows.fieldnames or []
            if missing := {"dataset", *METRICS} - {*names}:
                raise UserError(
                    f"{path} has no column {', '.join(sorted(missing))}: a file of scores has "
                    f"dataset, model, MASE and WQL."
                )
            return {
                row["dataset"]: {name: float(row[name] or "") for name in METRICS} for row in rows
            }
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path}, line {rows.line_num}: {error}.") from error


def scores_csv(model: str, scores: Mapping[str, Scores]) -> Iterable[str]:
    """The lines of such a file."""
    yield "dataset,model,MASE,WQL\n"
    for name, own in scores.items():
        yield f"{name},{model},{own['MASE']!r},{own['WQL']!r}\n"


class ScoreComparison(NamedTuple):
    """Scores beside those of a baseline."""

    model: str
    scores: dict[str, Scores]
    """By data set."""
    baseline: str | None = None
    baseline_scores: Mapping[str, Scores] = MappingProxyType({})
    relative: Scores | None = None
    """Geometric means over the data sets of the scores divided by the baseline's."""

    def to_json(self) -> dict[str, object]:
        """For each data set its MASE and WQL; with a baseline its scores and the means too."""
        tree: dict[str, object] = dict(self.scores)
        if self.baseline is not None:
            tree["baseline"] = {"name": self.baseline, **self.baseline_scores}
            tree["relative to baseline"] = self.relative
        return tree


def compared(
    model: str, scores: dict[str, Scores], baseline: str | None, baseline_scores: dict[str, Scores]
) -> ScoreComparison:
    """Raises UserError as `relative_scores`."""
    if baseline is None:
        return ScoreComparison(model, scores)
    own = {name: baseline_scores[name] for name in scores if name in baseline_scores}
    return ScoreComparison(model, scores, baseline, own, relative_scores(scores, own))


def print_scores(comparison: ScoreComparison, remarks: Mapping[str, str]) -> None:
    """A row per data set, and the geometric means; `remarks` says how each was scored."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("data set", no_wrap=True)
    sides = [(comparison.model, comparison.scores)]
    if comparison.baseline is not None:
        sides.append((comparison.baseline, dict(comparison.baseline_scores)))
    for name, _ in sides:
        for metric in METRICS:
            header = f"{metric}\n{escape(Path(name).stem)}"
            table.add_column(header, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for data in comparison.scores:
        cells = [f"{own[data][metric]:.7g}" for _, own in sides for metric in METRICS]
        table.add_row(escape(data), *cells, remarks.get(data, ""))
    if comparison.relative is not None:
        means = [f"{comparison.relative[metric]:.5f}" for metric in METRICS]
        table.add_row("geometric mean of ratios", *means)
    console = Console(highlight=False)
    if not console.is_terminal:  # in a pipe nothing is cut off
        console.width = 200
    console.print(table)
