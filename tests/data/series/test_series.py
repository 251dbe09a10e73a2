from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_jax.data.series import corpus as corpus_module
from moe_jax.data.series.corpus import corpus_of, open_corpus, write_corpus
from moe_jax.data.series.kernel_synth import KERNELS, kernel_series, kernel_synth
from moe_jax.data.series.mixup import Mixup, MixupSettings
from moe_jax.data.series.windows import SeriesWindows, WindowSettings
from moe_jax.errors import UserError

NAN = np.nan


def test_a_corpus_is_written_shard_by_shard_and_read_by_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "SHARD_VALUES", 10)
    series = [np.arange(size, dtype=np.float32) + size for size in (4, 7, 3, 2, 9, 1)]
    series[1][2] = NAN
    assert write_corpus(tmp_path / "c", iter(series), {"seed": 3}) == 6
    assert len(list((tmp_path / "c").glob("values-*.npy"))) == 3
    for corpus in (open_corpus(tmp_path / "c"), corpus_of(series)):
        assert len(corpus) == 6
        assert corpus.lengths().tolist() == [4, 7, 3, 2, 9, 1]
        for number, one in enumerate(series):
            np.testing.assert_array_equal(corpus[number], one)
        np.testing.assert_array_equal(corpus.part(4, 7, 12), [16, 17])
        whole, before = corpus.observed(4)
        assert whole.tolist() == [4, 6, 3, 2, 9, 1]
        assert before.tolist() == [0, 2, 0, 0, 5, 0]
    with pytest.raises(UserError, match="exists already"):
        write_corpus(tmp_path / "c", iter(series), {})


def test_corpora_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no corpus of series"):
        open_corpus(tmp_path)
    with pytest.raises(UserError, match="no series to write"):
        write_corpus(tmp_path / "none", iter([]), {})
    assert list(tmp_path.iterdir()) == []

    def fails() -> Iterator[np.ndarray]:
        yield np.ones(3)
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write_corpus(tmp_path / "part", fails(), {})
    assert list(tmp_path.iterdir()) == []
    write_corpus(tmp_path / "c", [np.ones(3)], {})
    np.save(tmp_path / "c" / "values-00000.npy", np.ones(2, np.float32))
    with pytest.raises(UserError, match="is not whole"):
        open_corpus(tmp_path / "c")


def test_the_bank_of_kernels() -> None:
    """Values by the formulas of scikit-learn's kernels, between places 0 and 3 of 5."""
    assert len(KERNELS) == 33
    x, d = np.linspace(0, 1, 5), 0.75
    expected = {
        0: np.exp(-2 * np.sin(np.pi * d / (24 / 5)) ** 2),
        22: 1 + x[0] * x[3],
        24: np.exp(-(d**2) / (2 * 0.1**2)),
        28: (1 + d**2 / (2 * 1.0)) ** -1.0,
        30: 0.0,
        32: 1.0,
    }
    for number, value in expected.items():
        covariance = KERNELS[number](5)
        assert covariance.shape == (5, 5)
        np.testing.assert_allclose(covariance[0, 3], value, atol=1e-12)
        np.testing.assert_allclose(covariance, covariance.T)
    np.testing.assert_allclose(KERNELS[31](5), np.eye(5))
    np.testing.assert_allclose(KERNELS[23](5), 100 + np.outer(x, x))


def test_kernel_synth_depends_on_seed_and_number_alone() -> None:
    series = list(kernel_synth(12, seed=5, length=64))
    assert {one.shape for one in series} == {(64,)} and series[0].dtype == np.float32
    assert all(np.isfinite(one).all() for one in series)
    np.testing.assert_array_equal(series[7], kernel_series(7, seed=5, length=64))
    assert not np.array_equal(series[7], kernel_series(7, seed=6, length=64))
    assert len({one.tobytes() for one in series}) == 12


def test_a_process_has_the_covariance_of_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """White noise of variance 1 alone, whatever is drawn: sums have more, products the same."""
    monkeypatch.setattr("moe_jax.data.series.kernel_synth.KERNELS", (KERNELS[31],))
    monkeypatch.setattr("moe_jax.data.series.kernel_synth.MOST_KERNELS", 1)
    values = np.stack(list(kernel_synth(200, length=16)))
    np.testing.assert_allclose(values.T @ values / 200, np.eye(16), atol=0.3)


def test_mixup() -> None:
    ramp = np.concatenate([[NAN], np.arange(1, 400.0)])
    corpora = [corpus_of([ramp, np.ones(5)]), corpus_of([np.full(60, -3.0), np.zeros(80)])]
    settings = MixupSettings(most=3, shortest=50, longest=100)
    mixup = Mixup(corpora, settings, seed=1)
    series = list(mixup.first(200))
    lengths = [len(one) for one in series]
    assert min(lengths) >= 50 and 60 < max(lengths) <= 100
    np.testing.assert_array_equal(series[3], Mixup(corpora, settings, seed=1).series(3))
    # Each part has a mean absolute value of 1 or is zero, and the weights sum to 1.
    assert max(np.nanmean(np.abs(one)) for one in series) <= 1 + 1e-5
    single = Mixup(corpora[1:], settings._replace(most=1))
    assert {tuple(np.unique(single.series(number))) for number in range(20)} == {(-1.0,), (0.0,)}
    with pytest.raises(UserError, match="source 2 has no series of 90 values"):
        Mixup(corpora, settings._replace(shortest=90))


SETTINGS = WindowSettings(16, 4, min_past=8, drop=0.0)


def test_windows_are_cuts_of_series_padded_in_front() -> None:
    series = [np.arange(12.0), 100 + np.arange(40.0), np.arange(11.0)]  # the last is too short
    windows = SeriesWindows([corpus_of(series)], settings=SETTINGS, seed=2)
    batch = windows.batch(range(200))
    assert batch["context"].shape == (200, 16) and batch["target"].shape == (200, 4)
    assert batch["context"].dtype == batch["target"].dtype == np.float32
    whole = np.concatenate([batch["context"], batch["target"]], axis=1)
    short = np.nanmax(whole, axis=1) < 100
    assert 99 <= short.sum() <= 101  # both in every two
    np.testing.assert_array_equal(whole[short][0], [NAN] * 8 + [*range(12)])
    assert (np.diff(whole[~short])[~np.isnan(np.diff(whole[~short]))] == 1).all()
    assert len(np.unique(whole[~short][:, -1])) > 20  # cuts are drawn
    again = windows.batch([7, 3])
    np.testing.assert_array_equal(again["target"], batch["target"][[7, 3]])
    other = SeriesWindows([corpus_of(series)], settings=SETTINGS, seed=3).batch(range(200))
    assert not np.array_equal(other["target"], batch["target"])


def test_corpora_are_mixed_in_exact_proportions() -> None:
    corpora = [corpus_of([np.full(40, float(number))] * 3) for number in range(2)]
    windows = SeriesWindows(corpora, [0.9, 0.1], settings=SETTINGS)
    assert windows.batch(range(40))["target"][:, 0].sum() == 4
    assert windows.batch(range(10))["target"][:, 0].sum() == 1
    with pytest.raises(UserError, match="not one positive number for each of 2 corpora"):
        SeriesWindows(corpora, [1.0], settings=SETTINGS)


def test_augmentation_drops_a_share_of_each_window() -> None:
    corpus = corpus_of([np.ones(400)])
    settings = WindowSettings(200, 50, drop=0.2)
    batch = SeriesWindows([corpus], settings=settings).batch(range(50))
    shares = np.isnan(np.concatenate([batch["context"], batch["target"]], axis=1)[:, 140:]).mean(1)
    assert 0.05 < shares.mean() < 0.15 and shares.max() < 0.3 and shares.std() > 0.03


def test_what_gives_no_windows() -> None:
    sparse = np.full(100, NAN)
    sparse[:5] = 1.0
    late = np.full(20, NAN)
    late[-3:] = 1.0
    with pytest.raises(UserError, match="corpus 1 has no series to train on: of its 3, 2 have 12"):
        SeriesWindows([corpus_of([sparse, late, np.ones(11)])], settings=SETTINGS)
    # One of few values: a window that has any in its context is looked for.
    sparse[40] = 1.0
    settings = SETTINGS._replace(max_missing=0.95)
    batch = SeriesWindows([corpus_of([sparse])], settings=settings).batch(range(50))
    assert (~np.isnan(batch["context"])).any(axis=1).mean() > 0.9


def test_series_are_held_out() -> None:
    series = [np.full(30, float(number)) for number in range(100)]
    settings = SETTINGS._replace(held_out=0.2)
    windows = SeriesWindows([corpus_of(series)], settings=settings)
    held = windows.held_out(1000)["target"][:, 0]
    assert 10 <= len(held) <= 30 and len(windows.held_out(3)["target"]) == 3
    trained = set(windows.batch(range(300))["target"][:, 0].tolist())
    assert trained | set(held.tolist()) == set(range(100)) and not trained & set(held.tolist())
    with pytest.raises(UserError, match="no series is held out"):
        SeriesWindows([corpus_of(series)], settings=SETTINGS).held_out(1)
