"""Local processes that form one mesh: started, watched, and restarted when one dies.

    supervise(Job(("train", "my.yaml"), processes=2, run_dir=Path("runs/mine")), max_restarts=3)

The processes meet through JAX's coordination service, which process 0 hosts; `launch` only starts
them, waits for their ends and passes signals on. When one dies the others wait in their next
collective for it, so they are killed. Only Linux and macOS: signals and process groups.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_jax.checkpoint.steps import saved_steps
from moe_jax.launch.process_log import ProcessLog, terminal_stderr
from moe_jax.runtime.distributed import LOST_PEER
from moe_jax.runtime.parent import PARENT_VARIABLE
from moe_jax.runtime.signals import SAVE_SIGNALS, collected_signals
from moe_jax.tracking.phases import HUNG
from moe_jax.tracking.process_files import process_path

_USER_ERROR = 2  # exit code of a process, as is HUNG; others above 0 are deaths
TOGETHER = 0.5  # seconds within which several ends have one cause
PORTS = 5  # tries, where another program takes the port between our look and its use
LONGEST_WAIT = 60.0  # seconds before a restart
STEADY = 3600.0  # seconds after which a server's death is a new one
STOP = (signal.SIGINT, signal.SIGTERM)  # these end a command; the others ask for a save
PASSED = (*STOP, *SAVE_SIGNALS)
GROW = signal.SIGUSR2  # to a job that shrank; to others it is passed on
_POLL = 0.02  # seconds


@dataclass(frozen=True)
class Job:
    """What is started: a command of `moe-jax` with its arguments, as several processes."""

    command: tuple[str, ...]
    processes: int
    devices: int | None = None  # simulated devices of each process
    run_dir: Path | None = None  # of a training run
    log_dir: Path | None = None
    mesh: str | None = None  # to tell of, where it is not the configured one

    def again(self) -> Job:
        """The same from the newest whole checkpoint; a server has none."""
        if self.command[0] == "serve":
            return self
        words = [word for word in self.command if word != "--overwrite"]
        for flag in ("--resume", "--fallback"):
            if flag not in words:
                words = with_options(words, flag)
        return dataclasses.replace(self, command=tuple(words))


@dataclass(frozen=True)
class Death:
    """The end of the process that ended the others."""

    process: int
    code: int  # as of `subprocess`: -N for signal N
    lines: list[str]  # the last ones of its log
    where: str  # what it did, where that is known
    port_taken: bool
    killed: int = 1  # processes that a signal ended, and not the end of another; 1 at least

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        return self.code if self.code >= 0 else 128 - self.code

    @property
    def as_asked(self) -> bool:
        """Whether it looks like what a signal to stop does to a process that saves nothing."""
        return self.exit_code in (128 + signal.SIGINT, 128 + signal.SIGTERM)

    @property
    def how(self) -> str:
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}" + (" (it hung)" if self.code == HUNG else "")


ArgumentsOf = Callable[[Job, int, int], list[str]]


def child_arguments(job: Job, process: int, port: int) -> list[str]:
    """The command line of one process."""
    meeting = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", str(job.processes))
    words = with_options(list(job.command), *meeting, "--process-id", str(process))
    return [sys.executable, "-m", "moe_jax", *words]


class Shrinking(Protocol):
    """How a job goes on with fewer processes: `moe_jax.launch.elastic.Elastic`."""

    def on_fewer(self, job: Job, lost: int) -> Job | None: ...

    def again_in_full(self) -> Job: ...


def supervise(
    job: Job,
    *,
    max_restarts: int = 0,
    wait: float = 1.0,
    arguments_of: ArgumentsOf | None = None,
    elastic: Shrinking | None = None,
) -> int:
    """Runs the job to its end; returns the exit code of the whole.

    A death is followed by a restart, `wait` seconds later, twice as long each time, up to
    `max_restarts` times in a row; a new checkpoint in between, or an hour of serving, begins the
    count again. A user's mistake (exit code 2) is not tried twice, nor is anything after a signal
    to stop. With `elastic` a restart is without the processes that died, where a mesh fits, until
    GROW comes.
    """
    arguments_of = arguments_of or child_arguments
    failures, newest, ports = 0, _newest_step(job.run_dir), 1
    with collected_signals(*PASSED) as received:
        while True:
            began = time.monotonic()
            group = _Group(job, arguments_of)
            death = group.watch(received)
            if elastic is not None and group.growing and (death is None or death.as_asked):
                job, failures, ports = _in_full(elastic), 0, 1
                continue
            if death is None:
                return group.stopped_code
            if death.port_taken and ports < PORTS and group.stopped is None:
                ports += 1
                continue
            if (code := _final(death, group, job)) is not None:
                return code
            if max_restarts == 0:
                return death.exit_code
            step = _newest_step(job.run_dir)
            steady = job.command[0] == "serve" and time.monotonic() > began + STEADY
            failures, newest = (0, step) if step > newest or steady else (failures, newest)
            if failures >= max_restarts:
                _say(
                    f"moe-jax launch: giving up after {max_restarts} restarts"
                    f"{'' if job.command[0] == 'serve' else ' without a new checkpoint'}."
                )
                return death.exit_code
            pause = min(wait * 2**failures, LONGEST_WAIT)
            failures, ports = failures + 1, 1
            job, how = _next_job(job, elastic, group.growing, death)
            origin = "the beginning" if step < 0 else f"the checkpoint of step {step}"
            _say(
                f"moe-jax launch: restart {failures} of at most {max_restarts} in {pause:g} s, "
                f"from {origin}{how}."
            )
            number = _wait_for_signal(received, pause, job)
            if number == GROW and elastic is not None:
                job, failures = _in_full(elastic), 0
            elif number is not None:
                return 128 + number


def _final(death: Death, group: _Group, job: Job) -> int | None:
    """The exit code of the whole where nothing may follow a death, which is told; else None."""
    if death.code == _USER_ERROR:
        if not group.told_user:
            _say("\n".join(death.lines[-1:]) or "moe-jax: a process refused to start.")
        return _USER_ERROR
    if group.stopped is not None and death.as_asked:
        return death.exit_code  # by a command that has nothing to save
    _say(_sentence(death, job))
    return death.exit_code if group.stopped is not None else None


def _in_full(elastic: Shrinking) -> Job:
    job = elastic.again_in_full()
    _say(f"moe-jax launch: going on with all {job.processes} processes.")
    return job


def _next_job(job: Job, elastic: Shrinking | None, growing: bool, death: Death) -> tuple[Job, str]:
    """What follows a death, and what to say of it."""
    if elastic is None:
        return job.again(), ""
    if growing:
        full = elastic.again_in_full()
        return full, f", with all {full.processes} processes"
    if death.killed == job.processes:
        return job.again(), f" with all {job.processes} again, because none of them is left"
    fewer = elastic.on_fewer(job, death.killed)
    if fewer is None:
        return job.again(), f" with {job.processes} again, because no smaller mesh fits the run"
    return fewer, (
        f", with {fewer.processes} of the {job.processes} processes on the mesh {fewer.mesh}; "
        f"all again: kill -USR2 {os.getpid()}"
    )


class _Group:
    """The processes of one start."""

    def __init__(self, job: Job, arguments_of: ArgumentsOf):
        self._job = job
        self.stopped: float | None = None  # when a signal to stop came
        self.stopped_code = 0
        self.growing = False  # whether it ends in order to go on with more processes
        self._children: list[subprocess.Popen[bytes]] = []
        self._logs: list[ProcessLog] = []
        self._typed = bool(sys.stdin and sys.stdin.isatty())
        port = _free_port()
        environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
        if job.devices is not None:
            environment["JAX_NUM_CPU_DEVICES"] = str(job.devices)
        stamp = _run_stamp(job)
        try:
            for process in range(job.processes):
                self._start(arguments_of(job, process, port), process, environment, stamp)
        except BaseException:
            self._kill()
            raise

    def _start(
        self, arguments: list[str], process: int, environment: dict[str, str], stamp: int
    ) -> None:
        reading, writing = os.pipe()
        first = process == 0
        # At a terminal process 0 must be of its foreground group, to read a prompt; so Ctrl-C comes
        # to it from there. All others are in sessions of their own, where only we send signals.
        try:
            child = subprocess.Popen(
                arguments,
                stdin=None if first else subprocess.DEVNULL,
                stdout=None if first else subprocess.DEVNULL,
                stderr=writing,
                env=environment,
                start_new_session=not (first and self._typed),
            )
        finally:
            os.close(writing)
        self._children.append(child)
        terminal = terminal_stderr() if first else None
        place = functools.partial(_log_file, self._job, process, stamp)
        self._logs.append(ProcessLog(reading, terminal, place))

    def watch(self, received: list[signal.Signals]) -> Death | None:
        """Waits for the end of all; None where it is a good one. At a death kills the others."""
        ends: dict[int, tuple[float, int]] = {}  # when and how
        try:
            while len(ends) < len(self._children):
                self._pass_on(received)
                now = time.monotonic()
                for process, child in enumerate(self._children):
                    if process not in ends and (code := child.poll()) is not None:
                        ends[process] = now, code
                bad = [when for when, code in ends.values() if code]
                # Those that ended after a mistake of the user may still have to say it.
                if bad and now > min(bad) + TOGETHER:
                    break
                time.sleep(_POLL)
            self._pass_on(received)  # what came before the last end
        finally:
            self._kill()
            for log in self._logs:
                log.close()
        bad_ends = {process: end for process, end in ends.items() if end[1]}
        if self.stopped_code or not bad_ends:
            return None
        return self._death(bad_ends)

    @property
    def told_user(self) -> bool:
        return self._logs[0].told_user

    def _death(self, ends: dict[int, tuple[float, int]]) -> Death:
        def follows(process: int) -> bool:
            return ends[process][1] == LOST_PEER or self._logs[process].blames_a_peer

        process = min(ends, key=lambda process: (follows(process), ends[process][0]))
        # JAX aborts processes that have lost another one.
        killed = sum(
            code < 0 and code != -signal.SIGABRT and not follows(other)
            for other, (_, code) in ends.items()
        )
        log = self._logs[process]
        code, lines = ends[process][1], log.last_lines()
        if code == _USER_ERROR and (sentence := log.sentence()) is not None:
            lines = [sentence]
        where = _phase(self._job.run_dir, process, self._children[process].pid)
        taken = any(log.port_taken for log in self._logs[:1])
        return Death(process, code, lines, where, taken, max(killed, 1))

    def _pass_on(self, received: list[signal.Signals]) -> None:
        """Passes signals to process 0, which brings the others to the same step; a second one to
        stop kills all. What a terminal sends (Ctrl-C, its end) process 0 has already.
        """
        while received:
            number = received.pop(0)
            now = time.monotonic()
            if number in STOP:
                ends, self.growing = self.growing, False
                if self.stopped is None:
                    self.stopped = now
                    if ends:  # a second signal would cut its save short
                        continue
                elif now - self.stopped > 1:  # `timeout` sends its signal twice
                    self._kill()
                    self.stopped_code = 128 + number
                    return
                else:
                    continue
            if self._typed and number in (signal.SIGINT, signal.SIGHUP):
                continue
            if number == GROW and self._job.mesh is not None:
                if self.growing:
                    continue
                self.growing, number = True, signal.SIGTERM  # it saves and ends well
            if self._children[0].poll() is None:
                self._children[0].send_signal(number)

    def _kill(self) -> None:
        for process, child in enumerate(self._children):
            if child.poll() is None:
                if process == 0 and self._typed:
                    child.kill()
                else:
                    os.killpg(child.pid, signal.SIGKILL)  # with what it has started
        for child in self._children:
            child.wait()


# Messages


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sentence(death: Death, job: Job) -> str:
    head = f"moe-jax launch: process {death.process} of {job.processes} {death.how}{death.where}"
    if not death.lines:
        return f"{head}; it had written nothing to stderr."
    return "\n  | ".join([f"{head}; the last lines of its log:", *death.lines])


def _phase(run_dir: Path | None, process: int, pid: int) -> str:
    """What a process did last, as it said itself; nothing where it has not begun to say so."""
    if run_dir is None:
        return ""
    path = process_path(run_dir, process)
    if not path.exists():
        return ""
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if state.get("pid") != pid:  # of an earlier start
        return ""
    return f" in phase {state.get('phase')!r} at step {state.get('step')}"


# Files of a run


def _newest_step(run_dir: Path | None) -> int:
    """The newest checkpoint's step; -1 where there is none."""
    return -1 if run_dir is None else max(saved_steps(run_dir / "checkpoints"), default=-1)


def _run_stamp(job: Job) -> int:
    """Which config.yaml lies in the run directory before a start that deletes it; else 0."""
    path = (job.run_dir or Path()) / "config.yaml"
    if job.run_dir is None or "--overwrite" not in job.command or not path.exists():
        return 0
    return path.stat().st_ino


def _log_file(job: Job, process: int, stamp: int) -> Path | None:
    """Where a process's log goes; None as long as the directory holds no run, because a run begins
    in an empty one only.
    """
    name = f"process_{process}.log"
    if job.log_dir is not None:
        return job.log_dir / name
    if job.run_dir is None:
        return None
    try:
        mark = (job.run_dir / "config.yaml").stat().st_ino
    except OSError:
        return None
    return None if mark == stamp else job.run_dir / "logs" / name


# Small parts


def with_options(words: list[str], *options: str) -> list[str]:
    """The words with more options; after `--` there would be arguments."""
    at = words.index("--") if "--" in words else len(words)
    return [*words[:at], *options, *words[at:]]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_signal(received: list[signal.Signals], seconds: float, job: Job) -> int | None:
    """A signal to stop that comes within this time, or to grow if `job` has shrunk."""
    ends_wait = STOP if job.mesh is None else (*STOP, GROW)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        # Of several the one to stop counts.
        for number in sorted(received, key=lambda number: number not in STOP):
            if number in ends_wait:
                received.clear()
                return int(number)
        received.clear()
        time.sleep(min(_POLL, seconds))
    return None
