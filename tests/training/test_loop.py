"""When the training loop waits for the device, and that its files are the same if it does not."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.errors import UserError
from moe_jax.runtime import platform
from moe_jax.training import trainer
from moe_jax.training.pending_steps import PendingSteps
from tests.support.tiny_programs import make_batch, make_program
from tests.support.tiny_run import lines, run, tiny, training_lines

# One device, so that steps in flight cannot wait for each other in the thread pool.
SETTINGS = (
    "devices.simulate=0",  # those that the tests have
    "mesh.data=1",
    "mesh.expert=1",
    "moe.input_noise=0.1",
    "moe.bias_rate=0.01",
    "placement.strategy=balanced",
    "placement.replan_every=6",
    "train.steps=9",
    "train.log_every=4",
    "train.eval_every=9",
    "checkpoint.every=9",
)
# The first, which compiles; the end of a window's first half; lines; the decision; the last.
FETCHED = {1, 3, 4, 6, 8, 9}


@pytest.fixture(scope="module")
def awaited(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a simulated device, which is awaited after each step."""
    return run(folder, tmp_path_factory.mktemp("awaited") / "run", *SETTINGS)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The trainer takes the CPU for an accelerator. A list that gets, for each array whose values
    come to the host, how many steps had been started.

    `jax.transfer_guard_device_to_host` never fires on CPUs, whose memory is the host's: the place
    where every such transfer goes through is watched instead.
    """
    cpu = dataclasses.replace(platform.PLATFORMS["cpu"], simulated=False)
    monkeypatch.setattr(trainer, "platform_of", lambda device: cpu)
    started, reads = [0], []
    add, values, wait = PendingSteps.add, ArrayImpl._value, jax.block_until_ready

    def counted(self: PendingSteps, stats: Any) -> None:
        started[0] += 1
        add(self, stats)

    def note() -> None:
        if threading.current_thread() is threading.main_thread():
            reads.append(started[0])

    def watched(self: ArrayImpl) -> np.ndarray:
        note()
        return values.fget(self)

    def waits(tree: Any) -> Any:
        note()
        return wait(tree)

    monkeypatch.setattr(PendingSteps, "add", counted)
    monkeypatch.setattr(ArrayImpl, "_value", property(watched))
    monkeypatch.setattr(jax, "block_until_ready", waits)
    return reads


def test_between_lines_and_decisions_nothing_comes_to_the_host(
    awaited: Path, folder: Path, tmp_path: Path, accelerator: list[int]
) -> None:
    directory = run(folder, tmp_path / "run", *SETTINGS)
    assert set(accelerator) - {0} == FETCHED  # 0: before the first step
    got, want = lines(directory), lines(awaited)
    for line in (*got, *want):
        if line.get("event") == "placement":
            assert line["measured"].pop("step_seconds") > 0
    assert got == want
    assert [line["step"] for line in training_lines(directory)] == [4, 8, 9]
    assert (directory / "traffic.json").read_text() == (awaited / "traffic.json").read_text()
    kept = [
        Checkpoints(path / "checkpoints", 9, 1).read_meta(9)["replanning"]
        for path in (directory, awaited)
    ]
    for one in kept:
        for window in (one["window"], one["before"]):
            assert window.pop("seconds") > 0
    assert kept[0] == kept[1]
    assert (kept[0]["window"]["timed"], kept[0]["before"]["timed"]) == (3, 5)


def test_a_simulated_device_is_awaited_in_every_step(
    folder: Path, tmp_path: Path, accelerator: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "platform_of", platform.platform_of)
    run(folder, tmp_path / "run", *SETTINGS)
    assert set(accelerator) - {0} == set(range(1, 10))


@pytest.mark.slow
def test_too_many_bad_steps_stop_an_unwatched_run_at_the_next_line(
    folder: Path, tmp_path: Path, accelerator: list[int]
) -> None:
    settings = (*SETTINGS, "placement.strategy=contiguous", "placement.replan_every=0")
    broken = ("optimizer.learning_rate=1e38", "train.max_skipped=2", "optimizer.warmup_steps=0")
    with pytest.raises(trainer.UserError, match=r"not finite in [23] steps in a row.* step 4"):
        run(folder, tmp_path / "run", *settings, *broken)
    assert Checkpoints(tmp_path / "run" / "checkpoints", 9, 1).steps() == [4]


def test_counts_are_fetched_before_they_could_overflow(
    folder: Path, tmp_path: Path, accelerator: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(folder, *SETTINGS)
    per_step = config.train.global_batch * config.train.seq_len * config.moe.top_k
    monkeypatch.setattr(trainer, "COUNT_LIMIT", 2 * per_step + 1)
    settings = (*SETTINGS, "placement.strategy=contiguous", "placement.replan_every=0")
    run(folder, tmp_path / "run", *settings, "train.log_every=9")
    assert set(accelerator) - {0} == {1, 3, 5, 7, 9}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["moe.top_k=1"], True),
        (["moe.top_k=1", "moe.score=sigmoid"], True),
        (["moe.top_k=1", "moe.normalize=before"], False),
        (["moe.top_k=2"], False),
        (["moe.top_k=1", "moe.num_experts=1"], False),
        (["moe.top_k=1", "moe.first_dense=2"], False),  # no layer has experts
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_router_that_cannot_learn_is_said(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    said: bool,
) -> None:
    """Before anything is read or compiled."""

    def stop(*_: Any, **__: Any) -> None:
        raise UserError("read no further")

    monkeypatch.setattr(trainer, "read_corpus", stop)
    one = ("devices.simulate=0", "mesh.data=1", "mesh.expert=1")
    with pytest.raises(UserError, match="read no further"):
        run(folder, tmp_path / "run", *one, *settings)
    err = capsys.readouterr().err
    assert ("moe.top_k=1 with moe.normalize=after" in err) == said
    assert ("with moe.normalize=before it does" in err) == said


def test_pending_counts_are_the_sum_of_the_steps_counts() -> None:
    program = make_program(1, 4)
    state, pending, each = program.init(7), PendingSteps(), []
    for step in range(3):
        pending.start()
        state, stats = program.train_step(state, program.shard(make_batch(step)))
        each.append(jax.device_get(stats))
        pending.add(stats)
    fetched = pending.fetch()
    want = jax.tree.map(lambda *counts: sum(counts), *(stats.layers.counts for stats in each))
    jax.tree.map(np.testing.assert_array_equal, fetched.counts, want)
    jax.tree.map(np.testing.assert_array_equal, fetched.stats, each[-1])
    assert fetched.steps == 3 and fetched.seconds > 0 and pending.steps == 0


def test_a_result_gives_the_run_s_history(awaited: Path) -> None:
    result = trainer.TrainingResult(awaited, 9, False, None, True)
    history = result.history()
    assert history.column("step").tolist() == [4, 8, 9]
    assert history.validation["step"].tolist() == [9]
    assert history.column("loss").tolist() == [
        record["loss"] for record in result.records() if "loss" in record
    ]
