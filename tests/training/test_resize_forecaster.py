"""Experts for a dense Chronos-Bolt folder: the run's first forecast is the folder's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_jax.data.series.corpus import write_corpus
from moe_jax.errors import UserError
from moe_jax.forecasting.load import load_forecaster
from moe_jax.forecasting.mixture import series_routes
from moe_jax.training.resize.resize import Wanted, resize
from tests.support import chronos_cases as cases
from tests.support.chronos_checks import assert_close

YAML = """
name: experts
moe: {{num_experts: 4, top_k: 2, route_by: sequence}}
data: {{source: {corpus}, validation_fraction: 0.3}}
train: {{global_batch: 4, eval_batches: 1}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    write_corpus(folder / "corpus", (np.sin(np.arange(200) / one) for one in range(1, 40)), {})
    (folder / "run.yaml").write_text(YAML.format(corpus=folder / "corpus"), encoding="utf-8")
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.build("bolt", tmp_path_factory.mktemp("bolt"))


def test_the_first_forecast_is_the_folders(folder: Path, config: Path, tmp_path: Path) -> None:
    said = resize(folder, tmp_path / "run", Wanted(experts=8, config=config))
    assert "copied into 8 experts, of which a series takes 2" in said
    assert f"moe-jax train {tmp_path / 'run' / 'config.yaml'}" in said
    dense, run = load_forecaster(folder), load_forecaster(tmp_path / "run")
    context = cases.expected("bolt")["context"]
    routes = series_routes(run, context)
    assert routes.expert_TK.shape == (len(context), 2)
    # 40 steps are three passes, each of which would show a difference in the one before.
    wanted = dense.predict(list(context), 40)
    size = np.maximum(cases.size_of(context), np.abs(wanted).max(axis=(1, 2)))
    off = np.abs(run.predict(list(context), 40) - wanted).max(axis=(1, 2)) / size
    assert off.max() < 1e-6
    assert_close(run.predict(list(context), 40), wanted, cases.size_of(context))


def test_what_cannot_be(folder: Path, config: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say how to train: add --config"):
        resize(folder, tmp_path / "run", Wanted(experts=8))
    with pytest.raises(UserError, match=r"--noise 0\.1 would change what"):
        resize(folder, tmp_path / "run", Wanted(experts=8, config=config, noise=0.1))
    with pytest.raises(UserError, match="is no Chronos-Bolt"):
        resize(cases.FOLDER / "dummy-t5", tmp_path / "run", Wanted(experts=8, config=config))
    other = config.with_name("other.yaml")
    other.write_text(config.read_text() + "model: {width: 64}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.width=64 but .* has 32 there"):
        resize(folder, tmp_path / "run", Wanted(experts=8, config=other))
    assert not (tmp_path / "run").exists()
