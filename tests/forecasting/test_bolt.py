"""Chronos-Bolt computes what the library computes, on one device and on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.forecasting.bolt import BoltForecaster
from moe_jax.forecasting.load import load_forecaster
from moe_jax.forecasting.placed_model import place
from moe_jax.hf.chronos import open_chronos
from moe_jax.models.chronos.bolt import ChronosBolt
from moe_jax.models.paths import by_path
from moe_jax.parallel.mesh import make_mesh
from tests.support import chronos_cases as cases
from tests.support.chronos_checks import MESHES, TOLERANCE, assert_close, assert_same_gradients


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_chronos(cases.build("bolt", tmp_path_factory.mktemp("bolt")))


@pytest.fixture(scope="module")
def forecaster(checkpoint: Any) -> BoltForecaster:
    return BoltForecaster(checkpoint.config, place(checkpoint))


WANTED = cases.expected("bolt")
SIZE = cases.size_of(WANTED["context"])


def states_and_losses(model: ChronosBolt, *rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return model.encode(rows[0]).states_BMD, model.losses(*rows)


def test_states_and_quantiles_are_the_librarys(forecaster: BoltForecaster) -> None:
    context = WANTED["context"]
    # A target may end before the forecast.
    found, losses = forecaster.placed.run(states_and_losses, context, WANTED["target"][:, :10])
    assert losses.mean() == pytest.approx(WANTED["short_loss"], rel=TOLERANCE)
    # A masked patch is computed too, and nobody reads it.
    seen = ~np.isnan(context[:, -96:]).reshape(len(context), -1, 8).all(axis=-1)
    seen = np.pad(seen, ((0, 0), (0, 1)), constant_values=True)
    assert_close(found[seen], WANTED["states"][seen])
    assert_close(forecaster.predict(list(context), 60), WANTED["quantiles"], SIZE)
    for steps in (1, 16, 17):
        assert_close(forecaster.predict(context, steps), WANTED["quantiles"][..., :steps], SIZE)


def test_levels_that_were_not_trained_are_interpolated(forecaster: BoltForecaster) -> None:
    quantiles, mean = forecaster.predict_quantiles(WANTED["context"], 20, cases.LEVELS)
    assert_close(quantiles, WANTED["at_levels"], SIZE)
    assert_close(mean, WANTED["quantiles"][:, 4, :20], SIZE)  # the median stands for it
    with pytest.raises(UserError, match=r"quantile level 1\.5"):
        forecaster.predict_quantiles(WANTED["context"], 4, [1.5])


def counted_losses(model: ChronosBolt, *rows: jax.Array) -> jax.Array:
    return model.losses(*rows[:2]) * rows[2]


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_and_gradients_are_the_librarys(checkpoint: Any, mesh: dict[str, int]) -> None:
    config = MeshConfig(**mesh)
    placed = place(checkpoint, make_mesh(config, jax.devices()[: config.size]), fsdp=True)
    # Twelve rows, which the devices divide: the last once more, which counts for nothing.
    context, target = (
        np.concatenate([WANTED[name], WANTED[name][-1:]]) for name in ("context", "target")
    )
    counts = np.float32([*[12 / 11] * 11, 0])
    loss, gradients = placed.gradients(counted_losses, context, target, counts)
    assert float(loss) == pytest.approx(WANTED["loss"], rel=TOLERANCE)
    assert_same_gradients(checkpoint, by_path(nnx.to_pure_dict(gradients)), WANTED)


def test_the_librarys_own_checkpoint_opens(tmp_path: Path) -> None:
    wanted = cases.expected("dummy-bolt")
    forecaster = load_forecaster(cases.FOLDER / "dummy-bolt")
    quantiles, mean = forecaster.predict_quantiles(wanted["context"], 70, cases.LEVELS)
    size = cases.size_of(wanted["context"])
    assert_close(quantiles, wanted["quantiles"], size)
    assert_close(mean, wanted["mean"], size)


def test_a_forecast_depends_on_its_series_alone(forecaster: BoltForecaster) -> None:
    series = [np.float32(np.sin(np.arange(length) / 3)) for length in (3, 95, 40)]
    together = forecaster.predict(series)
    assert_close(forecaster.predict(series[0])[0], together[0], 1)
    again = forecaster.predict([8 * one + 64 for one in series[::-1]])[::-1]
    assert_close(again, 8 * together + 64, 64)
    assert forecaster.predict([], 5).shape == (0, 9, 5)


def test_bad_series_are_refused(forecaster: BoltForecaster) -> None:
    with pytest.raises(UserError, match="Series 1 has an infinite value at step 2"):
        forecaster.predict([np.zeros(3), np.array([0, 1, np.inf])], 4)
    with pytest.raises(UserError, match="Series 0 has 2 dims"):
        forecaster.predict(np.zeros((1, 2, 3)), 4)
