"""What a process of a run does, for people and for supervisors, and a watchdog over it.

    with Phases(run_dir, process, processes, hang_timeout=None) as phases:
        phases.enter("data", 1)
        batch = next(batches)
        phases.enter("step", 1)

A thread of its own writes RUN_DIR/processes/process_<i>.json twice a second. The same thread ends
the process, with the stacks of all threads and exit code 75, where a phase stands still: JAX waits
without end for a process that is alive and stuck, such as one that was stopped by SIGSTOP.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_jax.runtime.process import take_beginning
from moe_jax.tracking.process_files import (
    ATTEMPTS,
    FOLDER,
    close_last_attempt,
    process_path,
    read_processes,
)
from moe_jax.utils.files import replace_bytes, replace_text
from moe_jax.utils.progress import say

INTERVAL = 0.5  # seconds between two words
HUNG = 75  # exit code
QUIET = 5.0  # seconds after which a process that should speak each INTERVAL says nothing
# Limits of a phase, in seconds, where train.hang_timeout is null, and of those that may take long.
LEAST, SLOW = 60.0, 600.0
STEP_TIMES = 10
ALWAYS_SLOW = ("start", "compile", "restore")
OFTEN_SLOW = ("checkpoint", "migration", "end")  # unless train.hang_timeout says otherwise
# Between two looks at most so much counts as standing still: a process that was stopped itself, or
# a machine that slept, has not hung.
MOST_BETWEEN_LOOKS = 5.0


class Phases:
    """The phases of a process, timed from the start of the program. Use it as a context manager.

    `hang_timeout` is train.hang_timeout, in seconds; `now` gives wall times in seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        process: int = 0,
        processes: int = 1,
        *,
        hang_timeout: float | None = None,
        now: Callable[[], float] = time.time,
        on_hang: Callable[[str], None] | None = None,
    ) -> None:
        self.run_dir, self.process, self.processes = run_dir, process, processes
        self.hang_timeout, self._now = hang_timeout, now
        self._on_hang = on_hang or _end_hung
        start = now()
        self.attempt = min(take_beginning() or start, start)
        self._lock = threading.Lock()
        self._phase, self._step, self._since = "start", 0, self.attempt
        self._from_step: int | None = None
        self._seconds: dict[str, float] = {}
        # Seconds of the newest steps, and of the step under way; None where it was compiled.
        self._durations: deque[float] = deque(maxlen=32)
        self._duration: float | None = None
        self._changes = self._seen = 0
        self._stood, self._looked = 0.0, start
        self._ended = self._told_of_error = False
        self._before: dict[Path, bytes | None] = {}  # files as they were, should nothing begin
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="phases", daemon=True)

    def __enter__(self) -> Phases:
        (self.run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        paths = [process_path(self.run_dir, self.process)]
        if self.process == 0:
            paths.append(self.run_dir / ATTEMPTS)
        self._before = {path: _content(path) for path in paths}
        if self.process == 0:
            # Those of processes of this start, which come and go by themselves, are not its own.
            for said in read_processes(self.run_dir):
                if said["beat"] < self.attempt:
                    path = process_path(self.run_dir, said["process"])
                    self._before[path] = json.dumps(said).encode()
            close_last_attempt(self.run_dir, self.attempt)
        self.write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        with self._lock:
            self._ended = True
        self.write()
        if self._from_step is None:  # it computed nothing, so it is no attempt
            for path, content in self._before.items():
                if content is None:
                    path.unlink(missing_ok=True)
                else:
                    replace_bytes(path, content)
            _remove_if_empty(self.run_dir / FOLDER)

    def enter(self, phase: str, step: int) -> None:
        """From now on the process does this, for this step (the first is 1; 0 before it)."""
        with self._lock:
            now = self._now()
            spent = now - self._since
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + spent
            if self._phase in ("data", "step") and self._duration is not None:
                self._duration += spent
            if phase == "data":
                if self._duration:
                    self._durations.append(self._duration)
                self._duration = 0.0
            elif phase == "compile":
                self._duration = None
                if self._from_step is None:
                    self._from_step = step - 1
            self._phase, self._step, self._since = phase, step, now
            self._changes += 1

    def said(self) -> dict[str, Any]:
        """What the file says: times are wall times, `seconds` add up to `beat - attempt`."""
        with self._lock:
            now = self._now()
            seconds = dict(self._seconds)
            seconds[self._phase] = seconds.get(self._phase, 0.0) + now - self._since
            durations = self._durations
            return {
                "process": self.process,
                "processes": self.processes,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "attempt": self.attempt,
                "from_step": self._from_step,
                "step": self._step,
                "phase": self._phase,
                "since": self._since,
                "beat": now,
                "seconds": seconds,
                "step_seconds": sum(durations) / len(durations) if durations else None,
                "ended": self._ended,
            }

    def write(self) -> None:
        """Writes the file, whole or not at all. A disk that fails does not end the run."""
        try:
            replace_text(process_path(self.run_dir, self.process), json.dumps(self.said()))
        except OSError as error:
            if not self._told_of_error:
                say(f"moe-jax status is not told how this run does: {error}.")
            self._told_of_error = True

    def limit(self) -> float:
        """Seconds for which the phase may stand still."""
        least = self.hang_timeout
        if least is None:
            durations = self._durations
            least = max(LEAST, STEP_TIMES * max(durations, default=0.0))
            if self._phase in OFTEN_SLOW:
                least = max(least, SLOW)
        return max(least, SLOW) if self._phase in ALWAYS_SLOW else least

    def look(self) -> None:
        """Counts how long the phase stands still, and ends the process where that is too long."""
        with self._lock:
            now = self._now()
            gap = min(max(now - self._looked, 0.0), MOST_BETWEEN_LOOKS)
            self._looked = now
            if self._changes != self._seen:
                self._seen, self._stood = self._changes, 0.0
                return
            self._stood += gap
            if self._stood <= self.limit():
                return
            # The time is the hang's and not the phase's.
            self._seconds["hang"] = self._seconds.get("hang", 0.0) + now - self._since
            stood, self._since = self._stood, now
            sentence = (
                f"process {self.process} has stood in phase {self._phase} of step {self._step} "
                f"for {stood:.0f} s, which is longer than "
                f"{'the limit for it' if self.hang_timeout is None else 'train.hang_timeout'}: "
            )
        self.write()
        self._on_hang(sentence + self._who())

    def _who(self) -> str:
        """Which process keeps the others waiting, as their files tell."""
        if self.processes == 1:
            return "the stacks of its threads say where."
        others = [said for said in read_processes(self.run_dir) if said["process"] != self.process]
        others = [said for said in others if said["beat"] >= self.attempt]
        missing = sorted(
            set(range(self.processes)) - {said["process"] for said in others} - {self.process}
        )
        if missing:
            return f"process {missing[0]} has said nothing yet."
        quiet = [said for said in others if self._now() - said["beat"] > QUIET]
        if quiet:
            last = min(quiet, key=lambda said: said["beat"])
            age = self._now() - last["beat"]
            return f"process {last['process']} on {last['host']} has said nothing for {age:.0f} s."
        behind = min(others, key=lambda said: (said["step"], said["since"]))
        if behind["step"] < self._step:
            return (
                f"process {behind['process']} on {behind['host']} is still in phase "
                f"{behind['phase']} of step {behind['step']}."
            )
        return "all processes are at this step, so none can be named."

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.write()
            self.look()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # never there, or cleared by the first process of this start
        return None


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # another process has a file in it, or has removed it
        return


def _end_hung(sentence: str) -> None:
    """Ends the process at once: threads that wait in C++ do not come back."""
    sys.stderr.flush()
    faulthandler.dump_traceback(file=2, all_threads=True)
    os.write(2, f"moe-jax: {sentence}\n".encode())
    os._exit(HUNG)
