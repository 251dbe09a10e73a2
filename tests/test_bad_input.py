"""Mistakes: each is refused in one sentence with the field, the value and the remedy, and costs
nothing that was there.

tests/config/ and tests/cli/ have those that show before the program starts; here a
run is about to begin, or is there already.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.cli import main
from moe_jax.errors import CorruptCheckpoint, UserError
from moe_jax.generation.generate import generate_run
from moe_jax.tracking.run_lock import locked
from moe_jax.training import trainer as training
from moe_jax.training.trainer import train
from tests.support.tiny_run import (
    config_file,
    copy_until,
    finished,
    lines,
    run,
    step_directory,
    tiny,
    training_lines,
)

GREEDY = {
    "max_tokens": 4,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
    "seed": 0,
    "step": None,
    "fallback": False,
}


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """A finished run with checkpoints at 3 and 6; only looked at."""
    return finished(folder, "moe.bias_rate=0.01")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return copy_until(base, tmp_path / "run", 6)


@pytest.fixture
def compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is built is a failure."""

    def build(*args: object, **options: object) -> None:
        pytest.fail("a model was built before the mistake was seen")

    monkeypatch.setattr(training, "TrainProgram", build)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def one_sentence(error: pytest.ExceptionInfo[BaseException]) -> bool:
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and len(text) < 700


# Before a run begins: nothing is compiled, and no directory appears.


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder of files that hold no usable text, or no tokenizer."""
    root = tmp_path / "sources"
    (root / "folder").mkdir(parents=True)
    (root / "empty.txt").write_text("")
    (root / "short.txt").write_text("too little")
    (root / "latin.txt").write_bytes(b"caf\xe9 " * 400)
    (root / "broken.json").write_text('{"model": 1')
    return root


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.source={}/nowhere.txt", "data.source=.*nowhere"),
        ("data.source={}/empty.txt", "data.source=.*empty"),
        ("data.source={}/short.txt", r"train\.seq_len"),
        ("data.source={}/latin.txt", r"latin\.txt.* UTF-8"),
        ("data.source={}/folder", "data.source=.*folder"),
        ("data.tokenizer={}/none.json", "data.tokenizer=.*does not exist"),
        ("data.tokenizer={}/broken.json", "data.tokenizer=.*cannot be read"),
        ("mesh.data=4", "needs 16 devices and there are 8"),
        (
            "model.vocab_size=100",
            "model.vocab_size=100 has no row for token 256, which ends a document.*: raise it",
        ),
        ("train.global_batch=16000", "train.global_batch=16000"),
        ("train.eval_batches=500", r"train\.eval_batches"),
    ],
)
def test_a_run_that_cannot_begin_writes_nothing(
    setting: str, words: str, sources: Path, folder: Path, tmp_path: Path, compiles_nothing: None
) -> None:
    config = tiny(folder, "devices.simulate=0", setting.format(sources))
    with pytest.raises(UserError, match=words) as error:
        train(config, tmp_path / "run")
    assert one_sentence(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("moe.num_expert=8", "did you mean moe.num_experts"),
        ("moe.top_k=99", "moe.top_k=99 exceeds moe.num_experts=4"),
        ("mesh.data=3", "devices.simulate=8: make them equal"),
        ("train.global_batch=9", "train.global_batch=9 is not divisible"),
        ("moe.capacity_factor=-1", "moe.capacity_factor=-1.*> 0"),
        ("data.source=/nowhere.txt", "data.source='/nowhere.txt'"),
    ],
)
def test_the_command_says_it_in_one_line_and_exits_with_2(
    setting: str,
    words: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    compiles_nothing: None,
) -> None:
    with pytest.raises(SystemExit) as leave:
        main.main(
            [
                "train",
                str(config_file(folder)),
                "--set",
                setting,
                "--run-dir",
                str(tmp_path / "run"),
            ]
        )
    out, err = capsys.readouterr()
    assert leave.value.code == 2
    assert out == "" and err.count("\n") == 1 and re.search(words, err)
    assert not (tmp_path / "run").exists()


# A directory that is in use.


def test_a_run_is_not_overwritten_by_accident(
    copy: Path, folder: Path, compiles_nothing: None
) -> None:
    before = contents(copy)
    with pytest.raises(
        UserError,
        match=r"holds a run already: continue it with --resume, replace it with --overwrite",
    ) as error:
        train(tiny(folder), copy)
    assert one_sentence(error) and contents(copy) == before


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_what_is_not_a_run_is_left_alone(
    options: dict[str, bool], folder: Path, tmp_path: Path, compiles_nothing: None
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something other than a run") as error:
        train(tiny(folder), tmp_path, **options)
    assert one_sentence(error) and (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="is a file: name a directory"):
        train(tiny(folder), tmp_path / "thesis.tex", **options)


def test_overwriting_spares_another_projects_directory(
    folder: Path, tmp_path: Path, compiles_nothing: None
) -> None:
    """config.yaml is a common name."""
    (tmp_path / "config.yaml").write_text("server: here\n")
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match=r"--overwrite would delete .*src, which no run wrote"):
        train(tiny(folder), tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "src"}


def test_overwriting_waits_until_the_new_run_can_begin(
    copy: Path, folder: Path, compiles_nothing: None
) -> None:
    before = contents(copy)
    with pytest.raises(UserError, match="does not exist"):
        train(tiny(folder, "data.tokenizer=/nowhere.json"), copy, overwrite=True)
    assert contents(copy) == before


def test_a_directory_left_before_its_first_file_was_whole_is_free(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / ".config.yaml.part").write_text("mode")
    run(folder, tmp_path, "moe.bias_rate=0.01")
    assert training_lines(tmp_path)[-1]["step"] == 6


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}], ids=str)
def test_a_run_that_another_process_trains_is_left_alone(
    options: dict[str, bool], copy: Path, folder: Path, compiles_nothing: None
) -> None:
    with locked(copy):
        before = contents(copy)
        with pytest.raises(UserError, match="in use by another `moe-jax train`") as error:
            train(tiny(folder, "moe.bias_rate=0.01", "train.steps=9"), copy, **options)
        assert one_sentence(error) and contents(copy) == before
    with locked(copy.parent / "new"), pytest.raises(UserError, match="in use by another"):
        train(tiny(folder), copy.parent / "new")


@pytest.mark.parametrize("key", ["data.source", "data.tokenizer", "placement.topology"])
def test_overwriting_does_not_delete_what_the_new_run_needs(
    key: str, copy: Path, folder: Path, compiles_nothing: None
) -> None:
    (copy / "tokenizer").mkdir()
    before = contents(copy)
    with pytest.raises(UserError, match=rf"{key}=.*/tokenizer/x lies in .*would delete"):
        train(tiny(folder, f"{key}={copy}/tokenizer/x"), copy, overwrite=True)
    assert contents(copy) == before


# A resumed run that is not the same run.


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.width=64", "model.width=64 but the run in .* began with 32"),
        ("model.rope.theta=1e6", "model.rope.theta=.* began with 10000.0"),
        ("moe.num_experts=8", "moe.num_experts=8 .* began with 4"),
        ("moe.z_loss=0.5", "moe.z_loss=0.5 .* began with 0.001"),
        ("train.seed=7", "train.seed=7 .* began with 0"),
        ("train.global_batch=32", "train.global_batch=32 .* began with 16"),
        ("optimizer.name=muon", "optimizer.name=muon .* began with adamw"),
        ("data.source=builtin", "data.source=builtin .* began with .*text.txt"),
        ("data.validation_fraction=0.1", "data.validation_fraction=0.1 .* began with 0.05"),
    ],
)
def test_a_changed_setting_is_named(
    setting: str, words: str, copy: Path, folder: Path, compiles_nothing: None
) -> None:
    before = contents(copy)
    with pytest.raises(UserError, match=words) as error:
        train(tiny(folder, "moe.bias_rate=0.01", "train.steps=9", setting), copy, resume=True)
    assert one_sentence(error) and contents(copy) == before


def test_a_changed_text_is_noticed(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes((folder / "text.txt").read_bytes())
    settings = ("moe.bias_rate=0.01", f"data.source={text}")
    directory = run(folder, tmp_path / "run", *settings)
    text.write_text(text.read_text().replace("router", "routed", 1))
    before = contents(directory)
    with pytest.raises(
        UserError, match=r"data.source=.* gives other text \(hash \w{12}\) than the run began with"
    ) as error:
        run(folder, directory, *settings, "train.steps=9", resume=True)
    assert one_sentence(error) and contents(directory) == before


# A damaged checkpoint.


def damage(directory: Path, harm: str) -> Path:
    """Harms the largest file of a checkpoint, or its metadata."""
    largest = max(
        (path for path in directory.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    path = directory / "meta.json" if harm == "meta" else largest
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    match harm:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case _:
            path.write_bytes(content)
    return path


@pytest.mark.parametrize("harm", ["flipped", "cut", "missing", "meta"])
@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_taken_when_asked(
    harm: str, copy: Path, base: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("moe.bias_rate=0.01",)
    path = damage(step_directory(copy, 6), harm)
    before = contents(copy)
    for use in (
        lambda: run(folder, copy, *settings, resume=True),
        lambda: generate_run(copy, "the", **GREEDY),
    ):
        with pytest.raises(
            CorruptCheckpoint, match=f"{re.escape(str(path))}.*--fallback takes step 3 instead"
        ) as error:
            use()
        assert one_sentence(error) and contents(copy) == before
    text = "".join(generate_run(copy, "the", **{**GREEDY, "fallback": True}))
    assert text == "".join(generate_run(base, "the", **{**GREEDY, "step": 3}))
    run(folder, copy, *settings, resume=True, fallback=True)
    assert f"Passed over a damaged checkpoint: {path}" in capsys.readouterr().out
    assert lines(copy) == lines(base)
    assert "".join(generate_run(copy, "the", **GREEDY)) == "".join(
        generate_run(base, "the", **GREEDY)
    )


@pytest.mark.parametrize("harm", ["flipped", "meta"])
def test_a_fallback_with_nothing_whole_does_not_start_anew(
    harm: str, copy: Path, folder: Path
) -> None:
    for step in (3, 6):
        damage(step_directory(copy, step), harm)
    before = contents(copy)
    with pytest.raises(CorruptCheckpoint) as error:
        run(folder, copy, "moe.bias_rate=0.01", resume=True, fallback=True)
    assert one_sentence(error) and contents(copy) == before
    with pytest.raises(CorruptCheckpoint):
        generate_run(copy, "the", **{**GREEDY, "fallback": True})


def test_a_checkpoint_that_was_never_finished_does_not_count(
    copy: Path, base: Path, folder: Path
) -> None:
    shutil.move(step_directory(copy, 6), copy / "checkpoints" / "step_00000006.partial")
    run(folder, copy, "moe.bias_rate=0.01", resume=True)
    assert lines(copy) == lines(base)
    assert Checkpoints(copy / "checkpoints", 9, 1).partial_steps() == []


def test_a_damaged_metrics_file_is_named(copy: Path, folder: Path) -> None:
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text("not json\n" + text)
    with pytest.raises(UserError, match=r"metrics.jsonl line 1 is not a metrics record"):
        run(folder, copy, "moe.bias_rate=0.01", resume=True, report=True)
    assert (copy / "metrics.jsonl").read_text() == "not json\n" + text


# Sampling.


@pytest.mark.parametrize(
    ("change", "prompt", "words"),
    [
        ({}, "", r"--prompt is empty: give at least one character"),
        ({"step": 5}, "the", r"no checkpoint of step 5 in .* \(there are: 3, 6\)"),
        ({"step": 1}, "the", r"holds no checkpoint of step 1 \(there are: 3, 6\): choose another"),
    ],
)
def test_sampling_mistakes(change: dict[str, int], prompt: str, words: str, base: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        list(generate_run(base, prompt, **{**GREEDY, **change}))
    assert one_sentence(error)


def test_sampling_from_what_is_no_run_or_has_not_saved(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        generate_run(tmp_path / "nowhere", "the", **GREEDY)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint: train first"):
        generate_run(copy, "the", **GREEDY)
