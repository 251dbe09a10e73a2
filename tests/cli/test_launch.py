"""`moe-jax launch`: what it refuses, and what it hands to supervision."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_jax.launch import processes
from moe_jax.launch.elastic import Elastic
from moe_jax.launch.processes import Job
from tests.support import ROOT
from tests.support.command import call

TINY = str(ROOT / "configs" / "tiny.yaml")


@pytest.fixture
def started(monkeypatch):
    """The jobs that were started, and with how many restarts; each ends with 7."""
    jobs: list[tuple[Job, int]] = []

    def supervise(job: Job, *, max_restarts: int, elastic: Elastic | None) -> int:
        assert elastic is None or elastic.full == job
        jobs.append((job, max_restarts))
        return 7

    monkeypatch.setattr(processes, "supervise", supervise)
    return jobs


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-n", "0", "--", "train", TINY], "-n 0 starts nothing: give 1 or more."),
        (["-n", "2"], "launch needs a command to run"),
        (["-n", "2", "--", "report", "x"], "launch cannot run 'report' as several processes"),
        (["-n", "3", "--", "train", TINY], "-n 3 processes cannot share the 8 devices"),
        (
            ["-n", "2", "--devices-per-process", "2", "--", "train", TINY],
            "is 4 devices, but the mesh has 8: give --devices-per-process 4.",
        ),
        (["-n", "2", "--", "train", TINY, "--set", "moe.top_k=99"], "moe.top_k=99"),
        (
            ["-n", "2", "--max-restarts", "1", "--", "eval", "x", "--text", "y"],
            "--max-restarts is for train and serve: eval",
        ),
        (["-n", "2", "--", "train", TINY, "--stp"], "No such option: --stp"),
        (["-n", "2", "--elastic", "--", "chat", "x"], "--elastic is for train: chat has no"),
        (["-n", "1", "--elastic", "--", "train", TINY], "-n 1 has only one; give -n 2 or more."),
        (
            ["-n", "2", "--elastic", "--max-restarts", "0", "--", "train", TINY],
            "which --max-restarts 0 forbids: leave one out.",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_are_said_before_anything_starts(started, capsys, words, sentence):
    assert call("launch", *words) == 2
    assert sentence in capsys.readouterr().err and not started


def test_a_run_is_started_where_train_would_write(started, tmp_path):
    """Also without --, and where the name of the configuration is the directory."""
    words = ("train", TINY, "--run-dir", str(tmp_path))
    assert call("launch", "-n", 2, "--devices-per-process", 4, "--", *words) == 7
    assert call("launch", "-n", 2, "--max-restarts", 3, "train", TINY, "--set", "name=other") == 7
    assert started[0] == (Job(words, 2, 4, tmp_path), 0)
    other = ("train", TINY, "--set", "name=other")
    assert started[1] == (Job(other, 2, None, Path("runs/other")), 3)


def test_other_commands_have_logs_on_request(started, tmp_path):
    words = ("generate", str(ROOT / "tests"), "--prompt", "--set")
    assert call("launch", "-n", 2, "--log-dir", tmp_path, "--", *words) == 7
    assert started == [(Job(words, 2, log_dir=tmp_path), 0)]
