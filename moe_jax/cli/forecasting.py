"""The commands forecast and eval-forecast; `main.py` adds them to `moe-jax`."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_jax.cli.console import explained_disk_errors
from moe_jax.cli.model_options import one_of, parse_mesh
from moe_jax.cli.options import (
    AsJson,
    Mesh,
    Platform,
    option,
    path_argument,
    path_option,
    spread,
)
from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.runtime.compile_cache import use_compile_cache
from moe_jax.runtime.devices import check_platform, start_devices, use_platform
from moe_jax.utils.files import local_path, replace_bytes, replace_text
from moe_jax.utils.progress import say

if TYPE_CHECKING:
    from moe_jax.forecasting.evaluate import EvaluationSet
    from moe_jax.forecasting.forecaster import Forecaster
    from moe_jax.forecasting.metrics import Scores
    from moe_jax.forecasting.tables.forecast_file import FileForecast
    from moe_jax.forecasting.tables.read import Columns

SEASONAL_NAIVE = "seasonal-naive"
LAYOUTS = ("auto", "long", "wide", "rows")  # of tables/read.py, whose import help does not wait for

Forecasting = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A Chronos folder or hub name, a run, or seasonal-naive.",
    ),
]
Id = Annotated[str | None, option("--id", metavar="NAME", help="Column of ids.  [item_id]")]
Timestamp = Annotated[
    str | None, option("--timestamp", metavar="NAME", help="Column of times.  [timestamp]")
]
Target = Annotated[
    str | None, option("--target", metavar="A,B", help="Columns to forecast.  [target]")
]
Layout = Annotated[
    str,
    typer.Option("--layout", metavar="NAME", help="auto, long, wide or rows (one series each)."),
]
Freq = Annotated[
    str | None,
    option("--freq", metavar="F", help="Frequency, as pandas has it.  [default: inferred]"),
]
FillGaps = Annotated[bool, typer.Option("--fill-gaps", help="Missing rows are missing values.")]
Season = Annotated[
    int | None,
    option("--season", metavar="N", min=1, help="Steps per season.  [default: the frequency's]"),
]
Samples = Annotated[
    int | None,
    option("--samples", metavar="N", min=1, help="Paths, if sampled.  [default: the model's]"),
]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of what is drawn.")]
Batch = Annotated[
    int, typer.Option("--batch", metavar="N", min=1, help="Series that are computed together.")
]
Plot = Annotated[Path | None, path_option("--plot", metavar="FILE", help="Picture, as PNG.")]


@dataclass(frozen=True)
class TableFlags:
    """How a table of series is read."""

    id: Id = None
    timestamp: Timestamp = None
    target: Target = None
    layout: Layout = "auto"
    freq: Freq = None
    fill_gaps: FillGaps = False

    def __post_init__(self) -> None:
        one_of("--layout", self.layout, LAYOUTS)
        targets = (self.target or "").split(",")
        if len({*targets}) != len(targets):
            raise UserError(f"--target {self.target} names a column twice: name it once.")

    @property
    def columns(self) -> Columns:
        """The columns that were named."""
        from moe_jax.forecasting.tables.read import Columns

        targets = None if self.target is None else tuple(self.target.split(","))
        return Columns(self.id, self.timestamp, targets)


@dataclass(frozen=True)
class ModelFlags:
    """How a model computes."""

    season: Season = None
    samples: Samples = None
    seed: Seed = 0
    batch: Batch = 256
    mesh: Mesh = None
    platform: Platform = None

    def __post_init__(self) -> None:
        check_platform(self.platform)
        _axes(self.mesh)


@spread
def forecast(
    model: Forecasting,
    data: Annotated[Path, path_argument("DATA", help="CSV or parquet file of series.")],
    horizon: Annotated[
        int | None,
        option("--horizon", metavar="N", min=1, help="Steps.  [default: those of the training]"),
    ] = None,
    future: Annotated[
        Path | None,
        path_option("--future", metavar="FILE", help="Covariates of the times to come."),
    ] = None,
    quantiles: Annotated[
        str, typer.Option("--quantiles", metavar="LEVELS", help="Between 0 and 1.")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    out: Annotated[
        Path | None,
        path_option("--out", metavar="FILE", help="CSV or parquet.  [default: CSV to stdout]"),
    ] = None,
    plot: Plot = None,
    *,
    table: TableFlags,
    run: ModelFlags,
) -> None:
    """Continue the series of DATA.

    Writes item, time, target_name, predictions and a column per quantile.
    """
    levels = _levels(quantiles)
    if horizon is None and model == SEASONAL_NAIVE:
        raise UserError("--horizon is missing: say how many steps to forecast.")
    check_outputs({"--out": out, "--plot": plot}, {"DATA": data, "--future": future})
    with as_options(), explained_disk_errors(out):
        from moe_jax.forecasting.tables.forecast_file import forecast_file
        from moe_jax.forecasting.tables.frames import ForecastSettings

        done = forecast_file(
            lambda steps: _open(model, run.season or steps.season, run),
            data,
            out,
            ForecastSettings(0, levels, run.batch, run.samples, run.seed),
            horizon=horizon,
            columns=table.columns,
            layout=table.layout,
            future=future,
            freq=table.freq,
            fill_gaps=table.fill_gaps,
        )
    _say_what_was_done(done, out, plot)
    if plot is not None:
        from moe_jax.forecasting.figures import forecast_figure

        with explained_disk_errors(plot):
            save_figure(forecast_figure(done.drawn, levels), plot)


def _say_what_was_done(done: FileForecast, out: Path | None, plot: Path | None) -> None:
    if done.ignored:
        say(f"MODEL reads no covariates; ignored: {', '.join(done.ignored)}.")
    for remark in done.remarks:
        say(remark)
    places = [str(path) for path in (out, plot) if path is not None]
    items = f"{done.items:,} item" + ("s" if done.items != 1 else "")
    say(f"forecast {items}" + (f" into {' and '.join(places)}" if places else ""))


@spread
def eval_forecast(
    model: Forecasting,
    data: Annotated[
        list[str] | None,
        option("--data", metavar="NAME", help="m4_hourly, etth or a file; may be repeated."),
    ] = None,
    data_dir: Annotated[
        Path,
        path_option("--data-dir", metavar="DIR", help="Folder of m4_hourly's and etth's files."),
    ] = Path("."),
    horizon: Annotated[
        int | None,
        option("--horizon", metavar="N", min=1, help="Steps held out.  [default: as published]"),
    ] = None,
    baseline: Annotated[
        str, typer.Option("--baseline", metavar="NAME", help="seasonal-naive, none, or scores.csv.")
    ] = SEASONAL_NAIVE,
    out: Annotated[
        Path | None, path_option("--out", metavar="FILE", help="CSV of the scores.")
    ] = None,
    plot: Plot = None,
    as_json: AsJson = False,
    *,
    table: TableFlags,
    run: ModelFlags,
) -> None:
    """Score forecasts of held-out values: MASE and WQL.

    In place of MODEL a CSV file of scores is compared with the baseline's.
    """
    tables = {"MODEL": Path(model), "--baseline": Path(baseline)}
    tables |= {f"--data {name}": Path(name) for name in data or ()}
    check_outputs({"--out": out, "--plot": plot}, tables)
    with as_options(), explained_disk_errors():
        from moe_jax.forecasting.evaluate import (
            compared,
            print_scores,
            read_scores,
            scores_csv,
        )

        if model.endswith(".csv"):
            sets: list[EvaluationSet] = []
            scores = read_scores(local_path(model))
        else:
            if not data:
                raise UserError("--data is missing: name m4_hourly, etth or a file of series.")
            sets = _evaluation_sets(data, data_dir, horizon, run.season, table)
            scores = _scores(model, sets, run)
        base = {} if baseline == "none" else _baseline(baseline, model, scores, sets)
        comparison = compared(model, scores, baseline if base else None, base)
    if as_json:
        print(json.dumps(comparison.to_json(), indent=2))
    else:
        print_scores(comparison, {one.name: _how(one) for one in sets})
    with explained_disk_errors(out or plot):
        if out is not None:
            replace_text(out, "".join(scores_csv(model, scores)))
        if plot is not None:
            from moe_jax.forecasting.figures import scores_figure

            save_figure(scores_figure(comparison), plot)


def _evaluation_sets(
    data: list[str], folder: Path, horizon: int | None, season: int | None, table: TableFlags
) -> list[EvaluationSet]:
    """Those of --data. Raises UserError where two would have one row of scores."""
    from moe_jax.forecasting.evaluate import evaluation_set

    sets = [
        evaluation_set(
            name,
            folder,
            horizon=horizon,
            season=season,
            columns=table.columns,
            layout=table.layout,
            freq=table.freq,
            fill_gaps=table.fill_gaps,
        )
        for name in data
    ]
    names = [one.name for one in sets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--data names two data sets {min(twice)!r}: rename the file of one.")
    return sets


def _how(data: EvaluationSet) -> str:
    return f"horizon {data.horizon}, season {data.season}"


def _scores(model: str, sets: list[EvaluationSet], run: ModelFlags) -> dict[str, Scores]:
    """The model's of each data set; a model is opened once."""
    from moe_jax.forecasting.evaluate import evaluate_forecaster

    scores: dict[str, Scores] = {}
    forecaster = None
    for one in sets:
        if forecaster is None or model == SEASONAL_NAIVE:
            forecaster = _open(model, one.season, run)
        sums = evaluate_forecaster(
            forecaster, one, batch_size=run.batch, num_samples=run.samples, seed=run.seed
        )
        scores[one.name] = sums.result()
    return scores


def _baseline(
    baseline: str, model: str, scores: dict[str, Scores], sets: list[EvaluationSet]
) -> dict[str, Scores]:
    """The baseline's scores; none where the model is the baseline."""
    from moe_jax.forecasting.evaluate import read_scores

    if baseline == model:
        return {}
    if baseline.endswith(".csv"):
        return read_scores(local_path(baseline))
    one_of("--baseline", baseline, (SEASONAL_NAIVE, "none"))
    if not sets:
        raise UserError(
            f"{model} has scores and no series: give --baseline a CSV file of scores too."
        )
    return _scores(SEASONAL_NAIVE, sets, ModelFlags())


def _open(model: str, season: int, run: ModelFlags) -> Forecaster:
    """The forecaster that MODEL names."""
    if model == SEASONAL_NAIVE:
        from moe_jax.forecasting.seasonal_naive import SeasonalNaive

        return SeasonalNaive(season)
    use_platform(run.platform)
    use_compile_cache()
    axes = _axes(run.mesh)
    start_devices(axes, None)
    import jax

    from moe_jax.forecasting.load import load_forecaster
    from moe_jax.parallel.mesh import first_devices, make_mesh

    if axes.size > jax.device_count():
        raise UserError(
            f"--mesh {axes.axes_text} needs {axes.size} devices and there are "
            f"{jax.device_count()}: choose a smaller mesh."
        )
    return load_forecaster(local_path(model), make_mesh(axes, first_devices(axes.size)))


def _axes(mesh: str | None) -> MeshConfig:
    """The mesh that was asked for, by default one device."""
    return MeshConfig() if mesh is None else parse_mesh(mesh)


def _levels(text: str) -> tuple[float, ...]:
    """Ascending levels of quantiles. Raises UserError for what is none."""
    try:
        levels = tuple(float(level) for level in text.split(","))
    except ValueError as error:
        raise UserError(f"--quantiles {text!r} cannot be read: write 0.1,0.5,0.9.") from error
    if not all(0 < level < 1 for level in levels) or len({*levels}) != len(levels):
        raise UserError(
            f"--quantiles {text!r} has a level that is not between 0 and 1, or one twice: write "
            f"0.1,0.5,0.9."
        )
    return levels


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Raises UserError, before anything is computed, for a file that cannot be written, or would
    take the place of one that is read, or of another output; by the names of the options.
    """
    taken = {path.resolve(): name for name, path in inputs.items() if path is not None}
    for name, path in outputs.items():
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise UserError(f"{name} {path}: there is no folder {path.parent}; make it.")
        if path.is_dir():
            raise UserError(f"{name} {path} is a folder: name a file.")
        if path.resolve() in taken:
            raise UserError(f"{name} {path} is {taken[path.resolve()]} too: name another file.")
        taken[path.resolve()] = name


def save_figure(figure: Any, path: Path) -> None:
    """Writes a picture, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    replace_bytes(path, content.getvalue())


@contextmanager
def as_options() -> Iterator[None]:
    """Errors that name arguments of the Python API name them as they are typed here."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"\b(id|timestamp)_column\b", r"--\1", str(error))
        text = re.sub(r"\bprediction_length=", "--horizon ", text)
        text = re.sub(r"\bfreq=", "--freq ", text)
        text = re.sub(r"\bleave freq out\b", "leave --freq out", text)
        text = re.sub(r"\bgive fill_gaps\b", "give --fill-gaps", text)
        text = re.sub(r"\bgive freq\b", "give --freq", text)
        text = re.sub(r"\bwith target\b", "with --target", text)
        text = re.sub(r"^target=", "--target ", text)
        raise UserError(text) from error
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        raise UserError(_PANDAS) from error


_PANDAS = "tables of series need the `pandas` package: pip install 'moe-jax[forecast]'."


# Each command: its name, its function and the example that its help ends with.
COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    (
        "forecast",
        forecast,
        "moe-jax forecast amazon/chronos-2 sales.csv --horizon 24 --plot sales.png",
    ),
    (
        "eval-forecast",
        eval_forecast,
        "moe-jax eval-forecast seasonal-naive --data etth --data-dir series",
    ),
]
