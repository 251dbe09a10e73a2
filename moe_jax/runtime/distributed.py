"""Several processes that run one program: how they join, wait for one another and fail together.

    join_processes(ProcessGroup("10.0.0.1:1234", 2, 0))  # before JAX starts
    meet("start of training", 60)  # all are here, or UserError says who is not
    text = broadcast_text("prompt", text)  # the first process's, on all of them

All of it is JAX's coordination service, which the first process hosts: its barriers and its store
of keys. `jax._src.distributed` is the only way to its client; nothing else here is private to JAX.
JAX's preemption service is left off: it takes SIGTERM for itself and knows no other signal
(`Agreement` serves all of them).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any, NoReturn

from moe_jax.errors import UserError
from moe_jax.utils import progress

JOIN_SECONDS = 300  # hosts of a pod do not start at the same moment
HEARTBEAT_SECONDS = 30  # without a sign of life from a process, JAX ends the others
GRACE_SECONDS = 60  # after which JAX itself, by an abort, ends a wait that we end before it
LEAVE_SECONDS = 600  # the first process may be drawing a report
LOST_PEER = 69  # exit code of a process that ended because another did
_PREFIX = "moe_jax"  # of our keys
_FAILURE = f"{_PREFIX}/failure"


@dataclass(frozen=True)
class ProcessGroup:
    """Where the processes of a command meet, as typed; JAX finds out what is None on a cluster.

    Raises UserError where only some is given, or it cannot be.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        given = {
            "--coordinator": self.coordinator,
            "--num-processes": self.num_processes,
            "--process-id": self.process_id,
        }
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise UserError(
                f"{', '.join(given.keys() - set(missing))} needs {' and '.join(missing)} too: give "
                f"all of {', '.join(given)}, or none of them on a cluster that JAX knows."
            )
        if self.coordinator is None:
            return
        assert self.num_processes is not None and self.process_id is not None
        if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:]+):\d{1,5}", self.coordinator):
            raise UserError(
                f"--coordinator {self.coordinator!r} is no HOST:PORT: name the host of process 0 "
                f"and a free port of it, such as 10.0.0.1:1234."
            )
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"--process-id {self.process_id} is not below --num-processes "
                f"{self.num_processes}: number the processes from 0."
            )


def join_processes(group: ProcessGroup, *, seconds: float = JOIN_SECONDS) -> None:
    """Makes this process one of several, if there are several; before JAX starts a back end.

    From here on only the first process writes to stdout and says anything. Raises UserError where
    the others are not found within `seconds`.
    """
    import jax
    from jax._src.xla_bridge import backends_are_initialized

    if jax.distributed.is_initialized() or (
        group.coordinator is None and backends_are_initialized()
    ):  # a command called in a program that computes already is alone
        return
    jax.config.update("jax_enable_preemption_service", False)
    if group.coordinator is not None:
        _check_coordinator(group, seconds)
    try:
        with _met_within(group, seconds):
            jax.distributed.initialize(
                group.coordinator,
                group.num_processes,
                group.process_id,
                initialization_timeout=int(seconds) + GRACE_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                cluster_detection_method=None if group.coordinator is None else "deactivate",
            )
    except ValueError:
        if group.coordinator is None:  # no cluster that JAX knows
            return
        raise
    except RuntimeError as error:
        raise UserError(_not_met(group, _first_line(error))) from error
    if process_count() > 1:
        _take_stdout(silent=not is_first())
        if not is_first():
            progress.mute()
        threading.Thread(target=_watch_failure, name="failure", daemon=True).start()


def process_count() -> int:
    """Processes of this program; JAX's back end need not run for that."""
    return _state().num_processes if _joined() else 1


def process_index() -> int:
    """The number of this process."""
    return _state().process_id if _joined() else 0


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return process_index() == 0


def local_share(devices: int, what: str) -> int:
    """How many of `devices` devices each process has. Raises UserError where they do not come out
    even; `what` is their name as typed.
    """
    count = process_count()
    if devices % count:
        raise UserError(
            f"{what} is {devices} devices, which {count} processes cannot share evenly: choose a "
            f"multiple of {count}, or other --num-processes."
        )
    return devices // count


def meet(name: str, seconds: float) -> None:
    """Waits until all processes are at this point; each name serves once. Raises UserError saying
    who was missing after `seconds`.
    """
    if process_count() == 1:
        return
    client = _state().client
    client.key_value_set(f"{_PREFIX}/at/{name}/{process_index()}", "")
    try:
        client.wait_at_barrier(f"{_PREFIX}/{name}", int(1000 * seconds))
    except _errors() as error:
        here = {int(key.rsplit("/", 1)[1]) for key, _ in _directory(f"{_PREFIX}/at/{name}/")}
        missing = sorted(set(range(process_count())) - here)
        who = f"process {', '.join(map(str, missing))}" if missing else "another process"
        raise UserError(
            f"{who} did not come to {name!r} within {seconds:.0f} s: see its log."
        ) from error


def broadcast_text(name: str, text: str | None, seconds: float | None = None) -> str:
    """The first process's text, on all of them; the others wait, by default as long as it takes.
    Each name serves once.
    """
    if process_count() == 1:
        assert text is not None
        return text
    if is_first():
        assert text is not None
        tell_processes(name, text)
        return text
    return hear_process(name, 0, 1e6 if seconds is None else seconds)


def tell_processes(what: str, text: str, forget: str | None = None) -> None:
    """Lets other processes hear a text, from any thread; `forget` was told before and is needed no
    more. No two calls of a process may have the same `what`.
    """
    if process_count() > 1:
        _state().client.key_value_set(f"{_PREFIX}/told/{what}/{process_index()}", text)
        if forget is not None:
            _state().client.key_value_delete(f"{_PREFIX}/told/{forget}/{process_index()}")


def hear_process(what: str, process: int, seconds: float) -> str:
    """What a process told. Raises UserError naming the process where it is silent for so long; what
    JAX raises where it has gone passes.
    """
    key = f"{_PREFIX}/told/{what}/{process}"
    try:
        return _state().client.blocking_key_value_get(key, int(1000 * seconds))
    except _errors() as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise UserError(
            f"process {process} has not told the {what} within {seconds:.0f} s: look at its log."
        ) from error


def compare_processes(name: str, text: str, seconds: float = 60) -> None:
    """Raises UserError, on all processes, where `text` is not the same on all of them."""
    if process_count() == 1:
        return
    first = broadcast_text(f"compare {name}", text if is_first() else None, seconds)
    if text != first:
        old, new = next(
            (
                pair
                for pair in zip(first.splitlines(), text.splitlines(), strict=False)
                if pair[0] != pair[1]
            ),
            (first[-60:], text[-60:]),
        )
        raise UserError(
            f"process {process_index()} on {socket.gethostname()} has another {name} than process "
            f"0: {new.strip()[:100]!r} where that has {old.strip()[:100]!r}; start all processes "
            f"with the same."
        )
    meet(f"compare {name}", seconds)


class Agreement:
    """A request that any process may make between two steps and that all take up at one step.

    A process that wants to stop says so in the store of keys, with the number of the step that it
    has done, and goes on. After each step whose results were fetched all look there. What was asked
    after an earlier step is seen by all of them, because nobody can finish a step before that
    process took part in it; what was asked after the same step waits for the next.
    """

    def __init__(self, name: str) -> None:
        self._key = f"{_PREFIX}/agreed/{name}"
        self._taken: set[str] = set()

    def ask(self, step: int, what: str) -> None:
        """Asks for something after `step`."""
        _set(f"{self._key}/{process_index()}/{step}/{what}")

    def take(self, step: int) -> list[str]:
        """What was asked after an earlier step than `step` and not taken up yet, sorted."""
        new: set[str] = set()
        for key, _ in _directory(f"{self._key}/"):
            _, asked_after, what = key.removeprefix(f"{self._key}/").split("/", 2)
            if key not in self._taken and int(asked_after) < step:
                self._taken.add(key)
                new.add(what)
        return sorted(new)


# Failing together


def fail(sentence: str, code: int) -> None:
    """Ends this process with `code`, and all others with the sentence, which must be printed
    already; returns where there are no others.

    Without this the others would wait in their next collective, and this one, at its exit, for
    them.
    """
    if process_count() == 1:
        return
    who = f"process {process_index()}"
    _set(_FAILURE, f"{code} {sentence if sentence.startswith(f'{who} ') else f'{who}: {sentence}'}")
    _go(code)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Around the work of a command: its end, whatever it is, is the end of all processes.

    A `UserError` passes, because who prints it must call `fail`.
    """
    try:
        yield
    except UserError:
        raise
    except SystemExit as end:
        if end.code in (0, None):
            _leave()
        else:
            fail(f"ended with exit code {end.code}.", end.code if isinstance(end.code, int) else 1)
        raise
    except BaseException as error:
        sentence = lost_peer(error)
        if sentence is not None:
            print(f"moe-jax: {sentence}", file=sys.stderr, flush=True)
            _exit(LOST_PEER)
        if process_count() > 1:
            traceback.print_exc()
            fail(f"{type(error).__name__}: {_first_line(error)}", 1)
        raise
    else:
        _leave()


def lost_peer(error: BaseException) -> str | None:
    """A sentence naming the processes that have gone, if this error came from that; else None."""
    if process_count() == 1 or not _is_peer_error(str(error)):
        return None
    _set(f"{_PREFIX}/present/{process_index()}")
    here = {process_index(), *_await_keys(f"{_PREFIX}/present/", process_count() - 1, 2.0)}
    gone = sorted(set(range(process_count())) - here)
    if not gone:
        return f"the connection to another process broke: {_first_line(error)}"
    names = ", ".join(map(str, gone))
    return f"process {names} of {process_count()} has ended: see its log."


def _is_peer_error(text: str) -> bool:
    signs = ("gloo", "connection closed by peer", "connection reset", "nccl", "coordination")
    return any(sign in text.lower() for sign in signs)


def _watch_failure() -> None:
    """Ends this process when another one fails, whatever it waits for at that moment."""
    try:
        told = _state().client.blocking_key_value_get(_FAILURE, 10**9)
    except _errors():  # the first process has gone, which the main thread will see
        return
    code, _, sentence = told.partition(" ")
    if re.match(rf"process {process_index()}\b", sentence):
        return  # it is about to end by itself
    time.sleep(0.5)  # so that what fails on all processes alike is said by each in its own words
    print(f"moe-jax: {sentence}", file=sys.stderr, flush=True)
    _go(int(code))


def _go(code: int) -> NoReturn:
    """Ends this process after a failure; the first one last, because with it JAX's service goes,
    and JAX aborts a process that loses that.
    """
    if is_first():
        _await_keys(f"{_PREFIX}/going/", process_count() - 1, 3.0)
    else:
        _set(f"{_PREFIX}/going/{process_index()}")
    _exit(code)


def _await_keys(prefix: str, count: int, seconds: float) -> set[int]:
    """Numbers of the processes that have set their key below `prefix`, once there are `count` of
    them or the time is over.
    """
    end = time.monotonic() + seconds
    while True:
        found = {int(key.rsplit("/", 1)[1]) for key, _ in _directory(prefix)}
        if len(found) >= count or time.monotonic() > end:
            return found
        time.sleep(0.05)


def _exit(code: int) -> NoReturn:
    """Ends at once: JAX's exit would wait for processes that wait for this one."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads it, and this process ends
            continue
    os._exit(code)


def _leave() -> None:
    """Ends the membership of a process whose work is done, once all are."""
    if process_count() > 1:
        meet("end", LEAVE_SECONDS)
        import jax

        jax.distributed.shutdown()


# The parts


def _joined() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _state() -> Any:
    from jax._src.distributed import global_state

    return global_state


def _directory(prefix: str) -> list[tuple[str, str]]:
    """Keys below a prefix with their values; none where the first process has gone."""
    try:
        return _state().client.key_value_dir_get(prefix)
    except _errors():
        return []


def _set(key: str, value: str = "") -> None:
    """Sets a key, unless it is set already or the first process has gone."""
    try:
        _state().client.key_value_set(key, value)
    except _errors():
        return


def _errors() -> type[Exception]:
    """What JAX's coordination service raises."""
    import jax

    return jax.errors.JaxRuntimeError


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _met_within(group: ProcessGroup, seconds: float) -> Iterator[None]:
    """Ends this process with a sentence where its processes have not met in time: JAX would abort
    it, with a stack dump. Nothing that would have to be cleared up has begun.
    """

    def give_up() -> None:
        sentence = _not_met(group, f"waited {seconds:.0f} s")
        print(f"moe-jax: {sentence}", file=sys.stderr, flush=True)
        _exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _not_met(group: ProcessGroup, why: str) -> str:
    if group.coordinator is None:
        return (
            f"the processes of this cluster's job did not find one another ({why}): see all logs."
        )
    return (
        f"process {group.process_id} did not meet the others at {group.coordinator} ({why}): start "
        f"all {group.num_processes} processes, and see that process 0 listens on that port."
    )


def _check_coordinator(group: ProcessGroup, seconds: float) -> None:
    """Tries the coordinator's port, because JAX ends the process where it cannot be had."""
    assert group.coordinator is not None
    host, _, port = group.coordinator.rpartition(":")
    host = host.strip("[]")
    if group.process_id == 0:
        family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except (OSError, OverflowError) as error:
                raise UserError(
                    f"--coordinator {group.coordinator}: process 0 cannot listen on port {port} "
                    f"({error}): name a free port."
                ) from error
        return
    end, reason = time.monotonic() + seconds, "nobody answers"
    while time.monotonic() < end:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            reason = str(error)
            if isinstance(error, OverflowError):  # a name may get its address a little later
                break
        time.sleep(0.2)
    raise UserError(
        f"--coordinator {group.coordinator} cannot be reached from process {group.process_id} on "
        f"{socket.gethostname()} ({reason}; waited {seconds:.0f} s): start process 0 there, and "
        f"see that the address is right and the port open."
    )


def _take_stdout(*, silent: bool) -> None:
    """Keeps stdout for ourselves: Gloo prints a line there for every group of devices that it
    connects.
    """
    if sys.stdout is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    if silent or not isinstance(sys.stdout, TextIOWrapper):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    else:
        own = os.fdopen(os.dup(1), "wb")
        sys.stdout = TextIOWrapper(
            own,
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            line_buffering=sys.stdout.line_buffering,
        )
    os.dup2(nowhere, 1)
    os.close(nowhere)
