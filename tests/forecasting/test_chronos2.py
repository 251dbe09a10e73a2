"""Chronos-2 computes what the library computes, on one device and on several."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.forecasting.chronos2 import Chronos2Forecaster
from moe_jax.forecasting.load import load_forecaster
from moe_jax.forecasting.placed_model import place
from moe_jax.forecasting.tasks import as_groups
from moe_jax.hf.chronos import open_chronos
from moe_jax.models.chronos.chronos2 import Chronos2
from moe_jax.models.paths import by_path
from moe_jax.parallel.mesh import make_mesh
from tests.support import chronos_cases as cases
from tests.support.chronos_checks import MESHES, TOLERANCE, assert_close, assert_same_gradients

WANTED = cases.expected("chronos2")
SERIES = [row[~np.isnan(row)] if at < 4 else row for at, row in enumerate(WANTED["series"])]
SIZE = cases.size_of(WANTED["series"])
# Groups of rows with room for three, of which a missing one is a row of the first once more.
ROWS = np.array([[0, 1, 0], [2, 3, 4], [5, 0, 0], [5, 0, 0]])
REAL = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_chronos(cases.build("chronos2", tmp_path_factory.mktemp("chronos2")))


@pytest.fixture(scope="module")
def forecaster(checkpoint: Any) -> Chronos2Forecaster:
    return Chronos2Forecaster(checkpoint.config, place(checkpoint))


def states_and_quantiles(model: Chronos2, *rows: jax.Array) -> tuple[jax.Array, ...]:
    encoded = model.encode(*rows)
    shape = (*rows[2].shape, *encoded.states_BMD.shape[1:])
    return encoded.states_BMD.reshape(shape), encoded.mask_BM.reshape(shape[:3]), model(*rows)


def counted_losses(model: Chronos2, *rows: jax.Array) -> jax.Array:
    return (model.losses(*rows[:4]) * rows[2]).sum(axis=1) * 4 / 6


def test_states_and_quantiles_of_groups_are_the_librarys(forecaster: Chronos2Forecaster) -> None:
    rows = WANTED["context"][ROWS], WANTED["future"][ROWS], REAL
    results = forecaster.placed.run(states_and_quantiles, *rows)
    found, mask, quantiles = (array[REAL] for array in results)
    assert_close(found[mask], WANTED["states"][mask])
    assert np.array_equal(mask[:, :13], WANTED["mask"] > 0)
    assert_close(quantiles, WANTED["quantiles"], cases.size_of(WANTED["context"]))


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_and_gradients_are_the_librarys(checkpoint: Any, mesh: dict[str, int]) -> None:
    config = MeshConfig(**mesh)
    placed = place(checkpoint, make_mesh(config, jax.devices()[: config.size]), fsdp=True)
    rows = WANTED["context"][ROWS], WANTED["future"][ROWS], REAL, WANTED["target"][ROWS]
    loss, gradients = placed.gradients(counted_losses, *rows)
    assert float(loss) == pytest.approx(WANTED["loss"], rel=TOLERANCE)
    assert_same_gradients(checkpoint, by_path(nnx.to_pure_dict(gradients)), WANTED)


def test_series_of_one_variable(forecaster: Chronos2Forecaster) -> None:
    found = forecaster.predict(SERIES, 24)
    assert_close(np.concatenate(found), WANTED["one"], SIZE)
    quantiles, medians = forecaster.predict_quantiles(SERIES, 24, cases.LEVELS)
    assert_close(np.concatenate(quantiles), WANTED["levels"], SIZE)
    assert_close(np.concatenate(medians), WANTED["one"][:, 10], SIZE)


def test_rows_that_learn_from_each_other(forecaster: Chronos2Forecaster) -> None:
    found = forecaster.predict(SERIES, 24, cross_learning=True)
    assert_close(np.concatenate(found), WANTED["jointly"], SIZE)


def test_horizons_beyond_one_pass(forecaster: Chronos2Forecaster) -> None:
    found = forecaster.predict([SERIES[0], SERIES[3]], 80)
    assert_close(np.concatenate(found), WANTED["long"], SIZE[[0, 3]])


def test_several_targets_and_covariates(forecaster: Chronos2Forecaster) -> None:
    series = WANTED["series"]
    found = forecaster.predict([series[3:6], series[4:7]], 24)
    for one, wanted, size in zip(found, WANTED["three"], (SIZE[3:6], SIZE[4:7]), strict=True):
        assert_close(one, wanted, size)
    for steps, name in ((24, "covariates"), (50, "covariates_long")):
        tasks = [
            {
                "target": series[3 + at, -150:],
                "past_covariates": {"a": series[5, -150:], "b": series[10, -150:]},
                "future_covariates": {"b": WANTED["known"][at, :steps]},
            }
            for at in range(2)
        ]
        found = forecaster.predict(tasks, steps)
        assert_close(np.concatenate(found), WANTED[name], SIZE[3:5])


def test_the_librarys_own_checkpoint_opens_on_several_devices() -> None:
    wanted = cases.expected("dummy-chronos2")
    mesh = make_mesh(MeshConfig(data=4, tensor=2), jax.devices())
    forecaster = load_forecaster(cases.FOLDER / "dummy-chronos2", mesh)
    quantiles, mean = forecaster.predict_quantiles(wanted["context"], 70, cases.LEVELS)
    size = cases.size_of(wanted["context"])
    assert_close(np.concatenate(quantiles), wanted["quantiles"], size)
    assert_close(np.concatenate(mean), wanted["mean"], size)


def test_categories_become_numbers() -> None:
    task = {
        "target": np.float32([1, 2, 6, np.nan, 3]),
        "past_covariates": {"kind": np.array(["x", "y", "x", "x", None], object)},
        "future_covariates": {"kind": np.array(["y", "z"], object)},
    }
    (group,) = as_groups([task], 2)
    # the mean 3, once, with 1 and 6 of x; with 2 of y; with the 3 where there is none
    x, y = np.float32(10 / 3), 2.5
    assert np.allclose(group.context_RT[1], [x, y, x, x, 3])
    assert np.allclose(group.future_RH[1], [y, 3])  # z is new
    assert np.isnan(group.future_RH[0]).all() and group.targets == 1
    (several,) = as_groups([task | {"target": np.ones((2, 5))}], 2)
    assert np.array_equal(several.context_RT[2], [0, 1, 0, 0, 2])
    assert np.array_equal(several.future_RH[2], [1, np.nan], equal_nan=True)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"target": [1.0, np.inf]}, "Series 0 has an infinite value at step 1"),
        ({"past": [1.0]}, "Series 0 has 'past'"),
        ({"target": [1.0], "future_covariates": {"a": [1.0, 2.0]}}, "'a' has a future and no past"),
        ({"target": [1.0], "past_covariates": {"a": [1.0, 2.0]}}, r"shape \[2\] where 1 steps"),
        ({"target": []}, "no target"),
    ],
)
def test_bad_tasks_are_refused(task: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_groups([task], 2)
