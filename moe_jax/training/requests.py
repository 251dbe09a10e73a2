"""What signals ask of a run: to save, or to save and stop. Several processes do so at one step."""

from __future__ import annotations

import signal
from typing import NamedTuple

from moe_jax.runtime.distributed import Agreement, process_count

_STOP = "stop"  # what is agreed on for SIGINT and SIGTERM


class Asked(NamedTuple):
    """What is to be done after a step."""

    saves: list[str]  # names of signals that want a checkpoint
    stops: bool


class Requests:
    """Signals that came since the last look, and the processes' agreement about them."""

    def __init__(self, saves: list[signal.Signals], stops: list[int]) -> None:
        """Both lists are filled by handlers of signals; from the first one they are taken out."""
        self._saves, self._stops = saves, stops
        self._agreement = Agreement("training")

    def waiting(self) -> bool:
        """Whether a signal is to be taken up after this step, whatever else is due; several
        processes take one up with the next results that they all fetch.
        """
        return process_count() == 1 and bool(self._saves or self._stops)

    def take(self, step: int) -> Asked:
        """What is asked after `step`, whose results have been fetched; all processes call it."""
        saves = [number.name for number in self._saves]
        self._saves.clear()
        if process_count() == 1:
            return Asked(saves, bool(self._stops))
        for name in [*saves, *([_STOP] if self._stops else [])]:
            self._agreement.ask(step, name)
        agreed = self._agreement.take(step)
        return Asked([name for name in agreed if name != _STOP], _STOP in agreed)
