"""Where the time of a run went: by hand, over a kill, a hang and a stop."""

from __future__ import annotations

import pytest

from moe_jax.tracking.status.goodput import goodput


def account(attempt: float, seconds: dict[str, float], **rest: object) -> dict:
    beat = attempt + sum(seconds.values())
    told = {"process": 0, "attempt": attempt, "beat": beat, "seconds": seconds, "ended": False}
    return told | {"from_step": 0, "step": 0, "phase": "step", "step_seconds": 1.0} | rest


def test_productive_and_lost_time_add_up_to_the_wall_time() -> None:
    first = account(100.0, {"start": 5, "compile": 10, "data": 2, "step": 17}, step=19)  # 18 done
    early = account(140.0, {"start": 3}, from_step=None)  # killed before it computed anything
    second = account(  # went on from step 10, hung in step 21
        150.0,
        {"start": 4, "restore": 2, "compile": 8, "step": 9, "hang": 60},
        from_step=10,
        step=21,
    )
    stopped = account(  # by a signal, with a checkpoint
        250.0,
        {"start": 4, "step": 6, "checkpoint": 1},
        from_step=20,
        step=26,
        phase="end",
        ended=True,
    )
    third = account(1000.0, {"start": 5, "step": 30, "evaluation": 3}, from_step=26, step=50)
    spent = goodput([first, early, second, stopped, third])
    assert spent.wall == 1038 - 100
    assert spent.lost == {
        "start": 21.0,
        "compile": 18.0,
        "data": 2.0,
        "evaluation": 3.0,
        "checkpoint": 1.0,
        "restore": 2.0,
        "migration": 0.0,
        "restart": 6.0 + 7.0 + 17.0,
        "recomputed": 8.0,  # steps 11 to 18
        "hang": 60.0,
        "end": 0.0,
        "stopped": 739.0,
    }
    assert spent.productive == 17 - 8 + 9 + 6 + 30
    assert spent.productive + sum(spent.lost.values()) == pytest.approx(spent.wall)
    assert spent.share == pytest.approx(54 / (938 - 739))


def test_steps_computed_again_are_no_more_than_the_attempt_computed() -> None:
    first = account(0.0, {"step": 5.0}, from_step=30, step=36)
    second = account(10.0, {"step": 5.0}, from_step=20, step=26)  # an earlier, good checkpoint
    assert goodput([first, second]).lost["recomputed"] == 5.0
    slow = account(0.0, {"step": 12.0}, from_step=0, step=5, step_seconds=None)  # 4 done, 3 s each
    assert goodput([slow, account(12.0, {}, from_step=2, step=2)]).lost["recomputed"] == 6.0
