"""Where the time of a run went, over all its attempts: productive steps, and what was lost by
cause.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from moe_jax.tracking.process_files import steps_done

# Causes in the order in which they are shown. Between two attempts a run was restarted, or stopped
# where the first had ended by itself.
CAUSES = (
    *("start", "compile", "data", "evaluation", "checkpoint", "restore", "migration"),
    *("restart", "recomputed", "hang", "end", "stopped"),
)


class Goodput(NamedTuple):
    """Seconds of a run. `productive` and all of `lost` add up to `wall`."""

    wall: float
    productive: float
    lost: dict[str, float]

    @property
    def share(self) -> float | None:
        """The productive part of the time, without that in which the run was stopped."""
        running = self.wall - self.lost["stopped"]
        return self.productive / running if running > 0 else None


def goodput(accounts: list[dict[str, Any]]) -> Goodput:
    """The account of a run from those of its attempts, oldest first, of which there is one at
    least. It goes up to the last word of the newest.
    """
    lost = dict.fromkeys(CAUSES, 0.0)
    productive = 0.0
    for number, account in enumerate(accounts):
        seconds = dict(account["seconds"])
        steps = seconds.pop("step", 0.0)
        for cause, spent in seconds.items():
            lost[cause] = lost.get(cause, 0.0) + spent
        again = min(_recomputed(account, accounts[number + 1 :]), steps)
        lost["recomputed"] += again
        productive += steps - again
        if number + 1 < len(accounts):
            gap = accounts[number + 1]["attempt"] - account["beat"]
            lost["stopped" if account["ended"] else "restart"] += gap
    return Goodput(accounts[-1]["beat"] - accounts[0]["attempt"], productive, lost)


def _recomputed(account: dict[str, Any], later: list[dict[str, Any]]) -> float:
    """Seconds of an attempt's steps beyond the checkpoint from which a later one went on."""
    went_on = [next_one["from_step"] for next_one in later if next_one["from_step"] is not None]
    if account["from_step"] is None or not went_on:
        return 0.0
    done = steps_done(account)
    lost = min(done - went_on[0], done - account["from_step"])
    if lost <= 0:
        return 0.0
    mean = account["seconds"].get("step", 0.0) / (done - account["from_step"])
    return lost * (account["step_seconds"] or mean)
