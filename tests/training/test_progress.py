"""What is printed while a run goes on, in a pipe."""

from __future__ import annotations

from typing import Any

import pytest

from moe_jax.training import progress
from moe_jax.training.progress import RunProgress


def record(step: int) -> dict[str, Any]:
    return {"step": step, "ce_loss": 2.5, "tokens_per_second": 1000.0, "dropped_fraction": 0.0}


@pytest.mark.parametrize("start", [0, 7])
def test_the_time_left_does_not_count_compilation(
    start: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with RunProgress(start + 150, start) as shown:
        clock[0] += 60  # compiles
        shown.train(record(start + 1))
        for step in range(2, 22):
            clock[0] += 1
            shown.train(record(start + step))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Compiling the training step."
    assert lines[1].startswith(f"step {start + 1}/{start + 150}") and "left" not in lines[1]
    assert lines[2].endswith("left 2 min 19 s") and lines[3].endswith("left 2 min 9 s")
    assert len(lines) == 4  # a line every ten seconds


def test_nothing_is_compiled_where_no_step_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with RunProgress(6, 6):
        pass
    assert capsys.readouterr().out == ""
