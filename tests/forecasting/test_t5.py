"""Chronos-T5 computes what the library computes, on one device and on several."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.forecasting.load import load_forecaster
from moe_jax.forecasting.placed_model import place
from moe_jax.forecasting.t5 import T5Forecaster
from moe_jax.hf.chronos import open_chronos
from moe_jax.models.chronos.bins import encode_context, encode_target
from moe_jax.models.chronos.t5 import ChronosT5, Drawing, _draw
from moe_jax.models.paths import by_path
from moe_jax.parallel.mesh import make_mesh
from tests.support import chronos_cases as cases
from tests.support.chronos_checks import MESHES, TOLERANCE, assert_close, assert_same_gradients

WANTED = cases.expected("t5")
SIZE = cases.size_of(WANTED["context"])
GREEDY = {"num_samples": 1, "top_k": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_chronos(cases.build("t5", tmp_path_factory.mktemp("t5")))


@pytest.fixture(scope="module")
def forecaster(checkpoint: Any) -> T5Forecaster:
    return T5Forecaster(checkpoint.config, place(checkpoint))


def counted_losses(model: ChronosT5, *rows: jax.Array) -> jax.Array:
    return model.losses(*rows[:4]) * rows[4]


def test_tokens_are_the_librarys(checkpoint: Any) -> None:
    bins = checkpoint.config.bins
    tokens = encode_context(WANTED["context"][:, -96:], bins)
    assert np.array_equal(tokens.ids_BT, WANTED["ids"])
    assert np.array_equal(tokens.mask_BT, WANTED["mask"] > 0)
    assert np.allclose(tokens.scale_B, WANTED["scale"], rtol=3e-7, atol=0)
    labels = encode_target(WANTED["target"], tokens.scale_B, bins)
    assert np.array_equal(labels.ids_BT, WANTED["labels"])
    assert np.array_equal(labels.mask_BT, WANTED["label_mask"] > 0)


def states_and_logits(model: ChronosT5, ids: Any, mask: Any, labels: Any) -> tuple[Any, Any]:
    return model.encode(ids, mask), model.logits(ids, mask, labels)


def test_states_and_logits_are_the_librarys(forecaster: T5Forecaster) -> None:
    tokens = WANTED["ids"], WANTED["mask"] > 0
    states, logits = forecaster.placed.run(states_and_logits, *tokens, WANTED["labels"])
    seen = tokens[1][:, ::8]
    assert_close(states[:, ::8][seen], WANTED["states"][seen])
    # A missing label is fed as what pads a text.
    assert_close(logits, WANTED["logits"])


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_gradients_and_paths_are_the_librarys(checkpoint: Any, mesh: dict[str, int]) -> None:
    config = MeshConfig(**mesh)
    devices = make_mesh(config, jax.devices()[: config.size])
    placed = place(checkpoint, devices, fsdp=True)
    # Twelve rows, which the devices divide: the last once more, which counts for nothing.
    rows = [WANTED["ids"], WANTED["mask"] > 0, WANTED["labels"], WANTED["label_mask"] > 0]
    labels = rows[3].sum()
    rows = [np.concatenate([array, array[-1:]]) for array in rows]
    counts = np.float32([*[12 / labels] * 11, 0])
    loss, gradients = placed.gradients(counted_losses, *rows, counts)
    assert float(loss) == pytest.approx(WANTED["loss"], rel=TOLERANCE)
    assert_same_gradients(checkpoint, by_path(nnx.to_pure_dict(gradients)), WANTED)
    forecaster = T5Forecaster(checkpoint.config, place(checkpoint, devices))
    path = forecaster.predict(WANTED["context"], 16, **GREEDY)[:, 0]
    assert_close(path, WANTED["path"][:, :16], SIZE)


def test_likeliest_tokens_are_the_librarys(forecaster: T5Forecaster) -> None:
    own = forecaster.config.sampling
    tokens = forecaster.placed.run(
        *(ChronosT5.generate, WANTED["ids"], WANTED["mask"] > 0, np.zeros((11, 2), np.uint32)),
        steps=16,
        paths=3,
        drawing=Drawing(own.temperature, 1, own.top_p),
    )
    assert np.array_equal(tokens, np.repeat(WANTED["greedy"][:, None], 3, axis=1))
    # Two blocks of 16 by the same program; an end of fewer steps is in the library's checkpoint.
    paths = forecaster.predict(WANTED["context"], 32, num_samples=3, top_k=1)
    for path in range(3):
        assert_close(paths[:, path], WANTED["path"][:, :32], SIZE)


def test_a_series_draws_by_its_number_alone(forecaster: T5Forecaster) -> None:
    options = {"num_samples": 3, "seed": 5}
    series = [WANTED["context"][at] for at in (4, 0, 10)]
    together = forecaster.predict(series, 16, **options)
    assert len(np.unique(together[2], axis=0)) == 3
    # The third series again, beside others.
    others = [series[2], WANTED["context"][1], WANTED["context"][2]]
    again = forecaster.predict(others, 16, first_series=2, **options)
    assert np.array_equal(together[2], again[0])
    assert not np.array_equal(again[0], forecaster.predict(others, 16, **options)[0])
    assert not np.array_equal(together, forecaster.predict(series, 16, num_samples=3, seed=6))
    quantiles, mean = forecaster.predict_quantiles(series, 16, [0.25, 0.5], **options)
    assert np.allclose(quantiles, np.moveaxis(np.quantile(together, [0.25, 0.5], axis=1), 0, -1))
    assert np.allclose(mean, together.mean(axis=1))


def test_draws_are_distributed_as_the_filters_say() -> None:
    chances = np.float32([0.35, 0.05, 0.3, 0.2, 0.1])
    scores = jnp.broadcast_to(jnp.log(chances), (1, 4000, 5))
    key = jax.random.key(0)[None]

    def shares(**options: Any) -> np.ndarray:
        drawn = _draw(scores, key, Drawing(**options))
        return np.bincount(np.asarray(drawn[0]), minlength=5) / 4000

    assert np.allclose(shares(), chances, atol=0.03)
    assert np.allclose(shares(top_k=2), [0.35 / 0.65, 0, 0.3 / 0.65, 0, 0], atol=0.03)
    # The last that is needed to reach 0.6 stays.
    assert np.allclose(shares(top_p=0.6), [0.35 / 0.65, 0, 0.3 / 0.65, 0, 0], atol=0.03)
    hot = chances**0.5 / (chances**0.5).sum()
    assert np.allclose(shares(temperature=2.0), hot, atol=0.03)


def test_the_librarys_own_checkpoint_opens() -> None:
    wanted = cases.expected("dummy-t5")
    forecaster = load_forecaster(cases.FOLDER / "dummy-t5")
    quantiles, mean = forecaster.predict_quantiles(wanted["context"], 70, cases.LEVELS, **GREEDY)
    size = cases.size_of(wanted["context"])
    assert_close(quantiles, wanted["quantiles"], size)
    assert_close(mean, wanted["mean"], size)


def test_options_that_leave_nothing_are_refused(forecaster: T5Forecaster) -> None:
    for options in ({"num_samples": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}):
        with pytest.raises(UserError, match=r"sample paths|temperature|top_p"):
            forecaster.predict(WANTED["context"], 4, **options)
