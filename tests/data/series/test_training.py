from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_jax.config.model import ForecastConfig
from moe_jax.config.schema import DataConfig, MixtureSource
from moe_jax.data.series import training
from moe_jax.data.series.corpus import corpus_of, open_corpus, write_corpus
from moe_jax.data.series.mixup import Mixup, MixupSettings
from moe_jax.data.series.training import SeriesData, load_series
from moe_jax.data.series.windows import WindowSettings, split_series
from moe_jax.errors import UserError

FORECAST = ForecastConfig(patch=4, context_length=8, prediction_length=4)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    write_corpus(tmp_path / "corpus", (rng.standard_normal(30) for _ in range(40)), {})
    return tmp_path / "corpus"


def read(*sources: str, seed: int = 0, **data: object) -> SeriesData:
    mixture = tuple(MixtureSource(source=source) for source in sources)
    settings = dict(min_past=4, validation_fraction=0.25) | data
    return load_series(DataConfig(mixture=mixture, **settings), FORECAST, seed)


def test_batches_go_on_from_their_state_and_are_cut_by_process(corpus: Path) -> None:
    data = read(str(corpus))
    batches = data.train_batches(8)
    first, second = next(batches), next(batches)
    assert first["context"].shape == (8, 8)
    assert first["target"].shape == (8, 4)
    again = data.train_batches(8)
    again.set_state({"batches": 1})
    np.testing.assert_array_equal(next(again)["context"], second["context"])
    assert again.get_state() == batches.get_state() == {"batches": 2}
    parts = [next(data.train_batches(8, process, 2)) for process in range(2)]
    np.testing.assert_array_equal(np.concatenate([p["target"] for p in parts]), first["target"])
    assert np.any(next(read(str(corpus), seed=1).train_batches(8))["context"] != first["context"])


def test_held_out_series_are_in_no_mixture(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []

    class Noted(Mixup):
        def __init__(self, corpora, settings, seed=0, only=None):
            given.extend(numbers.tolist() for numbers in only)
            super().__init__(corpora, settings, seed, only)

    monkeypatch.setattr(training, "Mixup", Noted)
    data = read("mixup:30", str(corpus))
    settings = WindowSettings(8, 4, min_past=4, held_out=0.25)
    trained, held = split_series(open_corpus(corpus), 1, settings)  # the second of the mixture
    assert given == [trained.tolist()]
    assert 0 < len(held) == 40 - len(trained)
    assert sum(data.windows.counts) == 70
    mixed = Mixup([corpus_of([np.ones(9), np.arange(9)])], MixupSettings(shortest=9), only=[[1]])
    np.testing.assert_allclose(mixed.series(0), np.arange(9) / 4)


def test_validation_is_the_same_for_every_seed_and_says_where_too_little_is_held_out(
    corpus: Path,
) -> None:
    one, other = (read(str(corpus), seed=seed).validation_batches(2, 2) for seed in (0, 5))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a["context"], b["context"])
    with pytest.raises(UserError, match=r"holds out \d+ series but a validation needs 64"):
        read(str(corpus)).validation_batches(32, 2)


def test_kernels_are_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[int] = []

    def kernels(count: int) -> list[np.ndarray]:
        made.append(count)
        return [np.arange(30, dtype=np.float32) + one for one in range(count)]

    monkeypatch.setattr(training, "kernel_synth", kernels)
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    told: list[str] = []
    source = DataConfig(source="kernel:20", min_past=4, validation_fraction=0.25)
    hashes = {load_series(source, FORECAST, seed, told.append).hash for seed in range(2)}
    assert (made, len(hashes), len(told)) == ([20], 1, 1)
    monkeypatch.setenv("MOE_JAX_CACHE", "")  # nothing is kept
    assert load_series(source, FORECAST, 0).hash in hashes
    assert made == [20, 20]


def test_what_is_no_series_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source=builtin is no corpus of series"):
        load_series(DataConfig(), FORECAST, 0)
    with pytest.raises(UserError, match=r"data\.mixture\[0\]\.source=mixup:9 mixes the series of"):
        read("mixup:9")
    write_corpus(tmp_path / "short", [np.zeros(5)], {})
    short = str(tmp_path / "short")
    with pytest.raises(UserError, match=r"data\.mixture\[1\]\.source=.*short has no series to"):
        read(str(corpus), short)
