"""A resumed run, without running it: its tokenizer, its text, its learning rate."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config.load import dump_config
from moe_jax.config.schema import Config, DataConfig, OptimizerConfig, TrainConfig
from moe_jax.data.corpus import Corpus, load_corpus
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.placement.table import contiguous
from moe_jax.tracking.run_dir import keep_tokenizer, run_tokenizer
from moe_jax.training import continuation
from moe_jax.training.restore import SavedRun
from tests.support.tokenizers import SAMPLE, save_folder, train_tokenizer

OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=0, final_fraction=0.1)


def saved(step: int, optimizer: OptimizerConfig, steps: int, **meta: Any) -> SavedRun:
    config = Config(optimizer=optimizer, train=TrainConfig(steps=steps))
    return SavedRun(step, {"config": dump_config(config), **meta}, contiguous(1, 8, 1))


# The learning rate


def test_more_steps_let_a_cosine_jump_and_both_rates_are_said() -> None:
    change = continuation.rate_change(saved(40, OPTIMIZER, 40), OPTIMIZER, 80)
    assert change is not None
    assert change.before == pytest.approx(0.001)  # 0.1 of the peak, where the cosine ended
    assert change.after == pytest.approx(0.0055)  # half-way: 0.1 + 0.9 / 2
    assert change.event() == {
        "event": "learning_rate",
        "step": 40,
        "before": change.before,
        "after": change.after,
        "changed": {"train.steps": [40, 80]},
    }
    sentence = change.sentence()
    assert "goes on at 0.0055 instead of 0.001, as train.steps=80 instead of 40;" in sentence
    rate = re.search(r"optimizer\.learning_rate=([\d.e-]+)", sentence)
    assert rate
    constant = dataclasses.replace(
        OPTIMIZER, schedule="constant", learning_rate=float(rate[1]), warmup_steps=20
    )
    assert continuation.rate_change(saved(40, OPTIMIZER, 40), constant, 80) is None


@pytest.mark.parametrize(
    ("changes", "steps", "step", "keys"),
    [
        ({}, 40, 20, None),
        ({}, 40, 40, None),
        ({"weight_decay": 0.0}, 40, 20, None),
        ({"learning_rate": 0.02}, 40, 20, ["optimizer.learning_rate"]),
        ({"schedule": "linear"}, 40, 10, ["optimizer.schedule"]),
        ({"warmup_steps": 30}, 40, 20, ["optimizer.warmup_steps"]),
        ({"final_fraction": 0.5}, 60, 30, ["train.steps", "optimizer.final_fraction"]),
    ],
)
def test_whatever_moves_the_rate_is_named(
    changes: dict[str, Any], steps: int, step: int, keys: list[str] | None
) -> None:
    now = dataclasses.replace(OPTIMIZER, **changes)
    change = continuation.rate_change(saved(step, OPTIMIZER, 40), now, steps)
    assert (change and list(change.changed)) == keys


def test_a_constant_rate_goes_on_with_more_steps() -> None:
    constant = dataclasses.replace(OPTIMIZER, schedule="constant")
    assert continuation.rate_change(saved(40, constant, 40), constant, 400) is None
    wsd = dataclasses.replace(OPTIMIZER, schedule="wsd")
    assert continuation.rate_change(saved(70, wsd, 100), wsd, 400) is None
    assert continuation.rate_change(saved(100, wsd, 100), wsd, 400) is not None


# The tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run that began with a tokenizer.json."""
    train_tokenizer(tmp_path / "tok.json", ["<|endoftext|>"])
    return begun(tmp_path / "run", str(tmp_path / "tok.json"))


def begun(directory: Path, tokenizer: str) -> Path:
    directory.mkdir()
    config = Config(data=DataConfig(tokenizer=tokenizer))
    (directory / "config.yaml").write_text(dump_config(config))
    keep_tokenizer(directory, tokenizer)
    return directory


def own(run: Path, tokenizer: object) -> str:
    return continuation.own_tokenizer(run, DataConfig(tokenizer=str(tokenizer)))


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_run_keeps_its_tokenizer_and_uses_it_anywhere(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (
        train_tokenizer(tmp_path / "tok.json", ["<|endoftext|>"])
        if form == "file"
        else save_folder(tmp_path / "tok")
    )
    before = load_tokenizer(str(given))
    run = begun(tmp_path / "run", str(given))
    moved = Path(shutil.move(run, tmp_path / "moved"))
    shutil.rmtree(given) if given.is_dir() else given.unlink()
    assert own(moved, given) == run_tokenizer(moved, Config(data=DataConfig(tokenizer="x")))
    kept = load_tokenizer(own(moved, given))
    assert (kept.fingerprint, kept.eos_id) == (before.fingerprint, before.eos_id)
    assert kept.encode(SAMPLE) == before.encode(SAMPLE)
    assert capsys.readouterr().out == ""


def test_the_same_tokenizer_may_lie_elsewhere(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tmp_path / "tok.json", tmp_path / "same.json")
    assert own(run, tmp_path / "same.json").startswith(str(run))
    assert capsys.readouterr().out == ""
    assert own(run, tmp_path / "nowhere.json").startswith(str(run))
    assert "nowhere.json does not exist: the run goes on with its own copy" in (
        capsys.readouterr().out
    )


def test_a_replaced_tokenizer_is_noticed_and_another_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer(tmp_path / "other.json", ["<|endoftext|>", "<new>"])
    for other in (tmp_path / "other.json", "bytes"):
        with pytest.raises(UserError, match="is another tokenizer than the run began with"):
            own(run, other)
    shutil.copy(tmp_path / "other.json", tmp_path / "tok.json")
    assert own(run, tmp_path / "tok.json") == str(run / "tokenizer")
    assert "tok.json has changed since the run began: the run goes on with its own copy" in (
        capsys.readouterr().out
    )


def test_a_run_of_bytes_or_of_an_earlier_version_keeps_none(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", "bytes")
    assert not (run / "tokenizer").exists()
    assert own(run, "bytes") == "bytes" and own(run, "tok.json") == "tok.json"


# The text


def corpus(path: Path, text: str, tokenizer: str = "bytes") -> tuple[Corpus, DataConfig]:
    path.write_text(text)
    data = DataConfig(source=str(path), tokenizer=tokenizer)
    return load_corpus(data, 8, 0), data


def test_the_same_text_may_lie_elsewhere_and_other_text_is_refused(tmp_path: Path) -> None:
    began, _ = corpus(tmp_path / "a.txt", SAMPLE)
    hashed = began.tokenizer.hash
    run = saved(1, OPTIMIZER, 2, corpus_hash=began.hash, tokenizer_hash=hashed)
    continuation.check_corpus(run, *corpus(tmp_path / "b.txt", SAMPLE))
    with pytest.raises(
        UserError, match=r"data\.source=.*c\.txt gives other text \(hash \w{12}\) than the run beg"
    ):
        continuation.check_corpus(run, *corpus(tmp_path / "c.txt", SAMPLE[1:]))
    tokenizer = train_tokenizer(tmp_path / "tok.json", ["<|endoftext|>"])
    with pytest.raises(UserError, match=r"data\.tokenizer=.*tok\.json is another tokenizer"):
        continuation.check_corpus(run, *corpus(tmp_path / "a.txt", SAMPLE, str(tokenizer)))
