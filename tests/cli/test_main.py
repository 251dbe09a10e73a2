"""The command line: help, exit codes, what it passes on, and what it does with errors; nothing is
trained here.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from moe_jax import __version__
from moe_jax.cli import main
from moe_jax.errors import UserError
from moe_jax.launch import doctor
from moe_jax.launch.probes import WrongArithmetic
from tests.support import ROOT
from tests.support.command import call, run_module

TINY = str(ROOT / "configs" / "tiny.yaml")


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["generate"],
        ["chat"],
        ["eval"],
        ["bench"],
        ["launch"],
        ["report"],
        ["doctor"],
    ],
    ids=lambda command: "-".join(command) or "moe-jax",
)
def test_help_fits_80_columns_and_ends_with_an_example(command, capsys):
    assert call(*command, "--help") == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-2].strip() == "Example:"
    assert lines[-1].split()[:1] == ["moe-jax"] and (not command or command[0] in lines[-1])


def test_help_and_config_errors_load_no_jax():
    mistakes = [
        ["train", TINY, "--set", "moe.top_k=99"],
        ["generate", "nowhere", "--prompt", "x"],
        ["generate", "tests", "--prompt", ""],
        ["chat", "tests", "--mesh", "expert:4"],
    ]
    helps = [["--help"], ["train", "--help"], ["chat", "--help"]]
    done = run_module("loaded_modules", json.dumps([*helps, *mistakes]))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[0, []]] * len(helps) + [[2, []]] * len(mistakes)


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"moe-jax {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train"],
        ["generate", "x"],
        ["generate", "x", "--prompt", "y", "--top-p", "2"],
        ["eval", "x"],
        ["doctor", "--jsn"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_2(arguments, capsys):
    assert call(*arguments) == 2
    assert "Usage: moe-jax" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "configs/nothere.yaml"], "there is no such file"),
        (["train", TINY, "--set", "moe.num_expert=8"], "did you mean moe.num_experts?"),
        (["train", TINY, "--set", "train.steps=many"], "a whole number"),
        (["train", TINY, "--set", "mesh.data=3"], "devices.simulate=8"),
        (["train", TINY, "--set", "name=../up"], "name='../up'"),
        (["train", TINY, "--resume", "--overwrite"], "contradict"),
        (["train", TINY, "--fallback"], "--resume"),
        (["generate", "--prompt", "x"], "MODEL is missing: name a Hugging Face folder, a run"),
        (["chat"], "MODEL is missing"),
        (["eval", "--text", "x"], "MODEL is missing"),
        (["bench"], "MODEL is missing"),
        (
            ["generate", "a", "--model", "b", "--prompt", "x"],
            "two models are given, a and --model b: name one.",
        ),
        (["generate", "nowhere", "--prompt", "x"], "moe-jax: nowhere does not exist"),
        (["generate", "--model", "nowhere", "--prompt", "x"], "moe-jax: nowhere does not exist"),
        (["generate", ".", "--prompt", ""], "--prompt is empty"),
        (["generate", ".", "--prompt", "x", "--stop", ""], "--stop is empty"),
        (
            ["generate", ".", "--prompt", "x", "--dtype", "f16"],
            "--dtype 'f16' is unknown",
        ),
        (
            ["generate", ".", "--prompt", "x", "--repetition-penalty", "0"],
            "--repetition-penalty 0.0 is out of range",
        ),
        (["chat", ".", "--mesh", "experts=4"], "--mesh 'experts=4' cannot be read"),
        (["chat", ".", "--memory", "lots"], "--memory 'lots' cannot be read"),
        (["eval", ".", "--text", "nothere.txt"], "--text nothere.txt: No such file"),
        (["bench", ".", "--quantize", "int3"], "--quantize 'int3' is unknown"),
        (["report", "nowhere"], "nowhere is not a run directory"),
        (["train", TINY, "--run-dir", "gs://bucket/run"], "gs://bucket/run is a URL"),
        (["train", TINY, "--set", "data.source=s3://bucket/a"], "data.source='s3://bucket/a'"),
        (["report", "file:///runs/first"], "file:///runs/first is a URL"),
        (["chat", "https://huggingface.co/a/b"], "a model on the hub is named as org/name"),
    ],
)
def test_mistakes_are_one_sentence_on_stderr_and_exit_2(
    arguments, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("moe-jax: ") and err.count("\n") == 1 and words in err
    assert list(tmp_path.iterdir()) == []


def test_train_passes_its_arguments_on(monkeypatch):
    calls = []

    def train(config, place, **options):
        calls.append((config.train.steps, place, options))
        return SimpleNamespace(report=None)

    monkeypatch.setattr("moe_jax.training.trainer.train", train)
    assert call("train", TINY, "--set", "train.steps=5") == 0
    assert call("train", TINY, "--run-dir", "there", "--resume", "--fallback") == 0
    assert calls[0] == (
        5,
        Path("runs/tiny"),
        {"resume": False, "overwrite": False, "fallback": False},
    )
    assert calls[1][1:] == (Path("there"), {"resume": True, "overwrite": False, "fallback": True})


@pytest.mark.parametrize("mark", ["environment.json", "checkpoints"])
@pytest.mark.parametrize("flags", [(), ("--resume",), ("--overwrite",)])
def test_the_configuration_of_a_run_is_that_run_whatever_its_name(
    mark, flags, monkeypatch, tmp_path
):
    """A run that was moved or copied: runs/NAME is another one."""
    places = []
    monkeypatch.setattr(
        "moe_jax.training.trainer.train",
        lambda config, place, **options: places.append(place) or SimpleNamespace(report=None),
    )
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / mark).touch()
    own = tmp_path / "moved" / "config.yaml"
    own.write_text("name: mine")
    (tmp_path / "config.yaml").write_text("name: mine")
    assert call("train", own, *flags) == 0
    assert call("train", own, "--run-dir", "there", *flags) == 0
    assert call("train", tmp_path / "config.yaml", *flags) == 0
    assert places == [tmp_path / "moved", Path("there"), Path("runs/mine")]


def test_the_home_folder_is_expanded(monkeypatch, tmp_path, capsys):
    """As in --run-dir=~/first, where no shell does it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call("report", "~/first") == 2
    assert f"{tmp_path}/first is not a run directory" in capsys.readouterr().err
    assert call("train", "~/x.yaml", "--run-dir=~/first") == 2
    assert f"{tmp_path}/x.yaml: there is no such file" in capsys.readouterr().err


def test_report_prints_the_path(monkeypatch, capsys, run_dir):
    monkeypatch.setattr("moe_jax.tracking.report.write_report", lambda place: place / "report.html")
    assert call("report", run_dir) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "runs/tiny: no space is left on its disk",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "deep/file"),
            "deep/file: no space is left",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "deep/file"),
            "deep/file: Permission denied",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "deep/file"),
            "deep/file: its file system is read-only; name another place.",
        ),
        (
            OSError(errno.ENOSYS, "Function not implemented", "deep/file"),
            "deep/file: its file system cannot do what is needed (Function not implemented)",
        ),
        (UserError("Correct this."), "moe-jax: Correct this.\n"),
    ],
)
def test_disk_errors_name_the_path(error, words, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("moe_jax.training.trainer.train", fail)
    assert call("train", TINY) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "{}", "--prompt", "x"],
        ["chat", "{}"],
        ["eval", "{}", "--text", "x"],
        ["bench", "{}"],
        ["inspect", "{}"],
        ["export", "{}", "out"],
        ["convert", "{}", "out"],
        ["resize", "{}", "out", "--experts", "4"],
        ["report", "{}"],
        ["watch", "{}"],
        ["train", TINY, "--run-dir", "{}"],
        ["placement", "show", "{}"],
        ["placement", "plan", "{}"],
    ],
    ids=lambda command: "-".join(command[:2]).replace("-{}", ""),
)
def test_a_folder_that_may_not_be_entered_is_named(command, tmp_path, monkeypatch, capsys):
    """Every command, whichever of its steps looks into the folder first. (Root may enter any.)"""
    folder, stat, scan = tmp_path / "closed", os.stat, os.listdir

    def closed(function, path, *rest, **options):
        if str(folder) + "/" in str(path) or (function is scan and str(path) == str(folder)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return function(path, *rest, **options)

    folder.mkdir()
    (tmp_path / "x").write_text("some text")
    monkeypatch.setattr(os, "stat", functools.partial(closed, stat))
    monkeypatch.setattr(os, "listdir", functools.partial(closed, scan))
    monkeypatch.chdir(tmp_path)
    assert call(*[word.replace("{}", str(folder)) for word in command]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"{folder}" in err and "Permission denied; check the path and its permissions" in err


def test_an_os_error_without_a_file_is_not_explained_away(monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("moe_jax.training.trainer.train", fail)
    with pytest.raises(OSError, match="Invalid argument"):
        main.main(["train", TINY])


def test_interrupt_exits_130_and_sigterm_143(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_jax.training.trainer.train", interrupted)
    assert call("train", TINY) == 130

    def terminated(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("moe_jax.training.trainer.train", terminated)
    assert call("train", TINY) == 143
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_went_away_is_no_error(run_dir):
    """stdout is a pipe that nobody reads any more: no traceback, nothing on stderr."""
    done = run_module("closed_pipe", "report", run_dir)
    assert done.stderr == ""


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_scripts_are_the_same_commands(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and f"Usage: moe-jax {script.removesuffix('.py')}" in done.stdout


def test_doctor_reports_this_machine():
    done = subprocess.run(
        [sys.executable, "-m", "moe_jax", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (0, True), found["problems"]
    status = {probe["name"]: probe["status"] for probe in found["probes"]}
    for probe in (
        "jit arithmetic",
        "bf16 matmul",
        "grouped_matmul reference",
        "grouped_matmul ragged",
        "grouped_matmul tiled",
    ):
        assert status[probe] == "ok", probe
    for probe in (
        "attention reference",
        "attention blockwise",
        "all_to_all",
        "f32 matmul rate",
        "memory read rate",
    ):
        assert status[probe] == "ok", probe
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_bytes"] > 2**30
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain"} <= {
        row["name"] for row in found["versions"]
    }


def test_doctor_names_bad_versions():
    asked = Requirement("jaxlib>=0.10.1,!=0.10.2,<0.12")
    assert "wrong results on CPU" in doctor.judge_version("jaxlib", "0.10.2", asked).problem
    assert "outside" in doctor.judge_version("jaxlib", "0.12.0", asked).problem
    assert doctor.judge_version("jaxlib", None, asked).problem.startswith(
        "jaxlib is not installed: pip install 'jaxlib"
    )
    assert [
        doctor.judge_version("jaxlib", good, asked).problem for good in ("0.10.1", "0.11.2")
    ] == ["", ""]


def test_doctor_exits_1_on_wrong_arithmetic(monkeypatch, capsys):
    def wrong():
        raise WrongArithmetic("element (3,) is 1 instead of 2")

    def missing():
        raise NotImplementedError("no such instruction\nat line 3")

    monkeypatch.setattr(
        doctor, "PROBES", [("broken", wrong), ("absent", missing), ("fine", lambda: "quick")]
    )
    monkeypatch.setattr(doctor, "split_cpu", lambda devices: None)
    assert call("doctor", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [probe["status"] for probe in found["probes"]] == ["ok", "wrong", "unavailable", "ok"]
    assert found["probes"][2]["text"] == "NotImplementedError: no such instruction"
    assert any(
        "element (3,) is 1 instead of 2; pip install 'jax>=" in problem
        for problem in found["problems"]
    )
    assert call("doctor") == 1
    out = capsys.readouterr().out
    assert "problem" in out and out.isascii()  # a pipe gets no frames
