"""A run in progress: reads what was appended to its metrics.jsonl, without disturbing the run."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from moe_jax.errors import UserError
from moe_jax.tracking.metrics import FILE_NAME, is_number, parse_record
from moe_jax.tracking.run_dir import read_run_config

# A run is quiet after so long without a new line: the larger of seconds, and times the usual gap.
QUIET_SECONDS = 30.0
QUIET_LINES = 10.0


class FollowedRun:
    """What has been read of a run so far."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._file: BinaryIO | None = None
        self._forget()

    def _forget(self) -> None:
        """Sets everything as if nothing had been read."""
        self.close()
        self._offset = 0
        self.steps: int | None = None
        """Steps of the whole run, from its config.yaml; None before that exists."""
        self.losses: list[float] = []
        """The loss of every training line, without NaN."""
        self.training: dict[str, Any] | None = None
        """The newest training line."""
        self.validation: dict[str, Any] | None = None
        self.traffic: dict[str, Any] | None = None
        self.events: list[dict[str, Any]] = []
        """Event lines, except those of traffic and checkpoints."""
        self.checkpoint: int | None = None
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._fresh = True  # the next training line's time includes compilation

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()
        self._file = None

    @property
    def step(self) -> int:
        """The newest logged step; 0 before the first."""
        return self.training["step"] if self.training else 0

    @property
    def over(self) -> bool:
        """Whether the run has ended: all its steps are done and saved, or it stopped earlier and
        drew its report.
        """
        if self.steps is None or not self.training:
            return False
        if self.checkpoint is not None and self.checkpoint >= self.steps:
            return True
        report, metrics = self.run_dir / "report.html", self.run_dir / FILE_NAME
        return (
            self.quiet is not None
            and report.exists()
            and report.stat().st_mtime >= metrics.stat().st_mtime
        )

    @property
    def quiet(self) -> float | None:
        """Seconds without a new line, if they are more than usual; otherwise None."""
        if not self.training or self._file is None:
            return None
        waited = time.time() - os.fstat(self._file.fileno()).st_mtime
        gap = self.training["step"] / max(len(self.losses), 1) * (self.step_seconds or 0.0)
        return waited if waited > max(QUIET_SECONDS, QUIET_LINES * gap) else None

    @property
    def step_seconds(self) -> float | None:
        """Mean seconds per step over the newest lines, without those that include compilation."""
        return sum(self._step_seconds) / len(self._step_seconds) if self._step_seconds else None

    def read(self) -> None:
        """Reads what was written since the last call; starts again if the file was replaced, as a
        resumed run does.
        """
        path = self.run_dir / FILE_NAME
        if self._file and (
            not path.exists() or path.stat().st_ino != os.fstat(self._file.fileno()).st_ino
        ):
            self._forget()
        if self._file is None:
            if not path.exists() or not (self.run_dir / "config.yaml").exists():
                return
            self._file = path.open("rb")
            self.steps = read_run_config(self.run_dir).train.steps
        for record in self._new_records(path):
            self._take(record)

    def _new_records(self, path: Path) -> Iterator[dict[str, Any]]:
        assert self._file is not None
        self._file.seek(self._offset)
        for line in self._file:
            if not line.endswith(b"\n"):
                return  # still being written
            self._offset += len(line)
            record = parse_record(line)
            if record is None:
                raise UserError(
                    f"{path} has a line that is not a metrics record, ending at byte "
                    f"{self._offset}: restore the file."
                )
            yield record

    def _take(self, record: dict[str, Any]) -> None:
        kind = record.get("event")
        if kind == "traffic":
            self.traffic = record
        elif kind == "checkpoint":
            self.checkpoint = record["step"]
        elif kind:
            self.events.append(record)
            self._fresh = self._fresh or kind == "resumed"
        elif "val_loss" in record:
            self.validation = record
        else:
            self.training = record
            if is_number(record.get("ce_loss")):
                self.losses.append(record["ce_loss"])
            if not self._fresh and is_number(record.get("step_seconds")):
                self._step_seconds.append(record["step_seconds"])
            self._fresh = False
