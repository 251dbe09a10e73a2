"""Real runs of `moe-jax launch` that scripts/faults.py plants faults in, and what it sees of them.

with Launch(training(run_dir), run_dir, options=("--max-restarts", 3)) as launch:
    told = kill(launch, run_dir, 1, in_phase(run_dir, 1, "step"))
    assert launch.finish() == 0 and curve(run_dir) == curve(undisturbed)
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parent.parent
PROCESSES, DEVICES = 2, 2  # on a mesh of data 2 x expert 2
STEPS, EVERY = 24, 6  # of a run, and between checkpoints
SOON = 5.0  # seconds within which a death must be noticed
LIMIT = 300.0  # seconds for whatever is awaited, on a machine that does other things too
SETTINGS: dict[str, object] = {
    "devices.simulate": PROCESSES * DEVICES,
    "mesh.data": 2,
    "mesh.expert": 2,
    "model.num_layers": 1,
    "model.width": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "moe.hidden": 32,
    "train.global_batch": 8,
    "train.seq_len": 64,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.eval_every": 8,
    # Evaluations take longer than the half second between two words of a process on what it does.
    "train.eval_batches": 40,
    "train.sample_prompt": "''",
    "checkpoint.every": EVERY,
    "checkpoint.keep_last": STEPS // EVERY,
}
# What C++ and Python say as they die, which is for logs and not for the terminal.
DUMP = re.compile(r"@\s+0x[0-9a-f]+|\*\*\* |Fatal Python error|Traceback|[Cc]heck fail|^[F]\d{4} ")
T = TypeVar("T")


class Missed(Exception):
    """The moment for a fault did not come, or what was to follow it did not."""


class Told(NamedTuple):
    """What followed a fault."""

    phase: str  # what the process did, as `launch` says
    noticed: float  # seconds until `launch` said it
    back: float | None  # seconds until training went on; None where no step was left
    again: int  # steps computed again
    under_way: int  # of them, steps taken while a save was not whole yet


class Launch:
    """A command over several processes, what it prints, and when."""

    def __init__(
        self,
        command: Sequence[object],
        place: Path,
        *,
        options: Sequence[object] = (),
        processes: int = PROCESSES,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Starts it; `place` is a path by which its processes' command lines are known."""
        words = ["launch", "-n", processes, *options, "--", *command]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._place = str(place)
        self.began = time.monotonic()
        self._lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moe_jax", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            start_new_session=True,
            env={
                "XLA_FLAGS": quick_flags(),
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": os.pathsep.join(paths),
                **(environment or {}),
            },
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append((time.monotonic(), line.rstrip("\n")))

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing of it is left, whatever happened."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in self.left_over():
            os.kill(pid, signal.SIGKILL)

    @property
    def text(self) -> str:
        """All that it has printed."""
        return "\n".join(line for _, line in self._lines)

    def said(self, pattern: str, since: float = 0.0) -> tuple[float, re.Match[str]] | None:
        """The first line since then that holds the pattern, and when it came."""
        for when, line in list(self._lines):
            if when >= since and (match := re.search(pattern, line)):
                return when, match
        return None

    def until(self, what: str, condition: Callable[[], T | None], seconds: float = LIMIT) -> T:
        """What `condition` gives once it gives something. Raises Missed where it never does."""
        end = time.monotonic() + seconds
        while (value := condition()) is None:
            if self.process.poll() is not None:
                self._reader.join(5)
                if (value := condition()) is not None:
                    break
                raise Missed(f"the run ended before {what}: {self.text[-300:]!r}")
            if time.monotonic() > end:
                raise Missed(f"{what} did not come within {seconds:.0f} s: {self.text[-300:]!r}")
            time.sleep(0.002)
        return value

    def workers(self) -> dict[int, int]:
        """The system's numbers of its processes that live, by their own."""
        found = {}
        for pid, command in running(self._place):
            match = re.search(r"--process-id (\d+)", command)
            if match:
                found[int(match[1])] = pid
        return found

    def left_over(self) -> list[int]:
        """Its processes that live."""
        alive = dict(running(self._place))
        return [pid for pid in alive if pid != os.getpid()]

    def finish(self, seconds: float = LIMIT) -> int:
        """Its exit code. Raises Missed where it does not end."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Missed(f"no end within {seconds:.0f} s: {self.text[-300:]!r}") from None
        self._reader.join(5)
        return self.process.returncode


def quick_flags() -> str:
    """Compiles quickly: what happens after a fault does not depend on the speed of a step."""
    flags = "--xla_backend_optimization_level=0"
    old = version("jaxlib").startswith("0.10.")  # later ones abort at flags that they do not know
    return f"{flags} --xla_cpu_use_fusion_emitters=false" if old else flags


def running(place: str) -> list[tuple[int, str]]:
    """Processes whose command line holds `place`, with it; dead ones that nobody waited for are
    not among them.
    """
    listed = subprocess.run(
        ["ps", "-axww", "-o", "pid=,stat=,command="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listed.splitlines() if place in line.split()]
    return [(int(pid), command) for pid, state, command in rows if not state.startswith("Z")]


# Training runs


def training(run_dir: Path, **settings: object) -> list[object]:
    """The command of the run that faults are planted in; `__` stands for the dot of a setting."""
    changed = {name.replace("__", "."): value for name, value in settings.items()}
    sets = [f"{key}={value}" for key, value in {**SETTINGS, **changed}.items()]
    options = [word for text in sets for word in ("--set", text)]
    return ["train", "configs/tiny.yaml", *options, "--run-dir", run_dir]


def lines_of(run_dir: Path) -> list[dict[str, object]]:
    """The training lines of a run; a last line that is being written is left out."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if "loss" in line]


def curve(run_dir: Path) -> list[tuple[object, ...]]:
    """Step, loss and gradient norm of each training line, as they stand in the file."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines_of(run_dir)]


def newest_step(run_dir: Path) -> int:
    """The last step that has a line."""
    return max((int(str(line["step"])) for line in lines_of(run_dir)), default=0)


def saved(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that count."""
    return sorted(int(path.name[5:]) for path in run_dir.glob("checkpoints/step_????????"))


def said_of(run_dir: Path, process: int) -> dict[str, object]:
    """What a process of the run last said of itself; nothing where it has said nothing."""
    path = run_dir / "processes" / f"process_{process}.json"
    try:
        said: dict[str, object] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return said


# Moments: functions that give the number of the process to be hit once the moment is there

Moment = Callable[[], int | None]


def in_phase(run_dir: Path, process: int, *phases: str, step: int = 0) -> Moment:
    """While a process says that it does one of these, at that step or a later one."""

    def moment() -> int | None:
        said = said_of(run_dir, process)
        there = said.get("phase") in phases and int(str(said["step"])) >= step
        alive = there and not said["ended"]
        return int(str(said["pid"])) if alive and _lives(int(str(said["pid"]))) else None

    return moment


def in_save(run_dir: Path, process: int) -> Moment:
    """While a checkpoint is being written: from the second one on, so that there is one before."""
    at_work = in_phase(run_dir, process, "checkpoint", "data", "step", "evaluation", "end")

    def moment() -> int | None:
        if not saved(run_dir) or (pid := at_work()) is None:
            return None
        began = float(str(said_of(run_dir, process)["attempt"]))
        # What an earlier start left behind is no save under way.
        return pid if any(made > began for made in _times_of_partial(run_dir)) else None

    return moment


def _times_of_partial(run_dir: Path) -> list[float]:
    """When the folders of unfinished saves were made or last changed, by wall time."""
    times = []
    for path in run_dir.glob("checkpoints/step_*.partial"):
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:  # it counts by now
            continue
    return times


def at_time(launch: Launch, process: int, seconds: float) -> Moment:
    """So many seconds after the start, or when the process is there."""

    def moment() -> int | None:
        if time.monotonic() < launch.began + seconds:
            return None
        return launch.workers().get(process)

    return moment


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# Faults

DEATH = r"moe-jax launch: process \d of \d (?:was|ended)[^;]*?(?: in phase '(\w+)'.*)?[;.]"


def kill(
    launch: Launch, run_dir: Path, moment: Moment, number: signal.Signals = signal.SIGKILL
) -> Told:
    """Sends a signal at a moment and sees the run restart. Raises Missed where it does not."""
    pid = launch.until("the moment for the fault", moment)
    os.kill(pid, number)
    hit = time.monotonic()
    when, death = launch.until("a word of launch", lambda: launch.said(DEATH, hit))
    # All processes are dead by now, so the files stand still until the next start.
    reached, partial = newest_step(run_dir), [*run_dir.glob("checkpoints/step_*.partial")]
    restart = (
        r"restart \d+ of at most \d+ in .* from (?:the beginning|the checkpoint of step (\d+))"
    )
    _, origin = launch.until("a restart", lambda: launch.said(restart, hit))
    began = int(origin[1] or 0)
    unfinished = min((int(path.name[5:13]) for path in partial), default=reached)
    back = None
    if reached < STEPS or began < STEPS:
        going = r"Resuming .* after step|Compiling the training step"
        launch.until("training after the restart", lambda: launch.said(going, when))
        back = time.monotonic() - hit
    under_way = max(reached - unfinished, 0)
    return Told(death[1] or "", when - hit, back, reached - began, under_way)


def faults_of(
    launch: Launch, run_dir: Path, expected: Iterable[tuple[object, ...]], code: int = 0
) -> list[str]:
    """What a run that has ended did wrong: nothing, where it is as the undisturbed one."""
    wrong = []
    if launch.process.returncode != code:
        wrong.append(f"exit code {launch.process.returncode}: {launch.text[-200:]!r}")
    elif code == 0 and curve(run_dir) != list(expected):
        wrong.append("the curve is another one")
    if dump := DUMP.search(launch.text):
        wrong.append(f"on the terminal: {dump[0]!r}")
    if left := launch.left_over():
        wrong.append(f"processes left over: {left}")
    return wrong


# What rows of the table share


@dataclass
class Outcome:
    """What a fault did, over the times that it was planted."""

    noticed: list[float] = field(default_factory=list)
    back: list[float] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    times: int = 0
    skipped: str = ""

    def add(self, told: Told, *, within: float = SOON) -> None:
        """One restart. Steps that were taken while a save was not whole come on top of the
        interval.
        """
        self.noticed.append(told.noticed)
        self.again.append(told.again)
        self.notes.append(told.phase or "before it says what it does")
        if told.back is not None:
            self.back.append(told.back)
        if told.noticed > within:
            self.wrong.append(f"noticed after {told.noticed:.1f} s")
        if told.again > EVERY + told.under_way:
            self.wrong.append(f"{told.again} steps computed again")

    def join(self, other: Outcome) -> None:
        """Adds what happened at other times."""
        for one in dataclasses.fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


class Bench:
    """Where runs go, and the undisturbed one, which is made when it is first needed."""

    def __init__(self, folder: Path, seed: int, moments: int) -> None:
        self.folder, self.seed, self.moments = folder, seed, moments
        self.environment = {"MOE_JAX_CACHE": str(folder / "cache")}
        self._curve: list[tuple[object, ...]] = []
        self.seconds = 0.0  # that the undisturbed run took
        self._count = 0

    @property
    def undisturbed(self) -> Path:
        """The directory of the undisturbed run."""
        run_dir = self.folder / "undisturbed"
        if not self._curve:
            with self.launch(run_dir) as launch:
                code = launch.finish()
                self.seconds = time.monotonic() - launch.began
                self._curve = curve(run_dir)
                if code or len(self._curve) != STEPS or DUMP.search(launch.text):
                    raise SystemExit(f"the undisturbed run failed ({code}):\n{launch.text}")
        return run_dir

    @property
    def curve(self) -> list[tuple[object, ...]]:
        """Its steps, losses and gradient norms."""
        assert self.undisturbed
        return self._curve

    def new_run(self) -> Path:
        """A directory for a run."""
        self._count += 1
        return self.folder / f"run{self._count}"

    def half_run(self) -> Path:
        """A copy of the undisturbed run as it was after half of its steps."""
        run_dir = self.new_run()
        shutil.copytree(self.undisturbed, run_dir)
        for step in saved(run_dir):
            if step > STEPS // 2:
                shutil.rmtree(run_dir / "checkpoints" / f"step_{step:08d}")
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= STEPS // 2))
        return run_dir

    def launch(
        self,
        run_dir: Path,
        *more: object,
        restarts: int = 0,
        cache: bool = True,
        **settings: object,
    ) -> Launch:
        """A training run over two processes."""
        return Launch(
            [*training(run_dir, **settings), *more],
            run_dir,
            options=("--max-restarts", restarts),
            environment=self.environment if cache else {"MOE_JAX_CACHE": ""},
        )
