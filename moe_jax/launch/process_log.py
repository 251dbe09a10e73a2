"""What a launched process writes to stderr: to its log file, and of process 0 to the terminal too,
without stack dumps.
"""

from __future__ import annotations

import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

KEPT = 1 << 20  # bytes that wait for their file
TAIL = 1 << 14  # bytes kept for a message
SHOWN = 12  # lines of a log in a message
_IDLE = 0.2  # seconds after which a line that has not ended is shown as it is
_LIVES = 3.0  # seconds after which a traceback was not the end of its process

# Lines of C++ and of stack dumps, which belong into the log: signals and frames, absl's own log,
# Gloo, what gRPC adds to a status, Python's faulthandler.
_DUMP = re.compile(
    rb"\*\*\* |PC: @|\s+@\s|[EFWI]\d{4} \d\d:|\[Gloo\] Rank|RPC: /|Additional GRPC error|:UNKNOWN:"
    rb"|Fatal Python error|(Current t|T)hread 0x|  File \"|Extension modules:|  <no Python frame>"
)
_UNDECIDED = b"*@EFWITPRAC: [m"  # how lines begin that may have to be hidden
_BAR = re.compile(rb"(.*\r(?!\n))?(\x1b\[[\d;?]*[A-Za-z])*", re.DOTALL)
_TRACEBACK = b"Traceback (most recent call last)"
# What launch says itself, and better.
_SAID = re.compile(
    rb"moe-jax: process [\d, ]+of \d+ has ended|moe-jax: the connection to another process broke"
    rb"|moe-jax: .*cannot listen on port"
)
_PORT_TAKEN = re.compile(rb"cannot listen on port|[Aa]ddress already in use")
# Lines of a process that ends because another one did.
_PEER = re.compile(
    rb"gloo|[Cc]onnection (closed|reset) by peer|coordination service|CoordinationService"
    rb"|distributed service|moe-jax: process [\d, ]+(of \d+ has ended|:)",
)


class ProcessLog:
    """Reads a pipe in a thread until its end: all of it into `file()`, once that names one, and the
    lines worth it to `terminal`.
    """

    def __init__(self, pipe: int, terminal: BinaryIO | None, file: Callable[[], Path | None]):
        self._pipe, self._terminal, self._file = pipe, terminal, file
        self._handle: BinaryIO | None = None
        self._broken = False
        self._waiting, self._tail = b"", b""  # for the file; for messages
        self._line, self._trace = b"", b""  # held back from the terminal
        self._begun = False  # whether the terminal has the beginning of the line that comes
        self._trace_since, self._after_dump = 0.0, False
        self.told_user = False  # whether the terminal has a sentence of this process
        self._thread = threading.Thread(target=self._read, name="log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Waits for what is left in the pipe; not for a grandchild that holds it open."""
        self._thread.join(2)

    def last_lines(self) -> list[str]:
        """The last lines that say something; a traceback whole."""
        lines = self._tail.replace(b"\r", b"\n").decode(errors="replace").splitlines()
        lines = [line for line in lines if line.strip() and not _DUMP.match(line.encode())]
        starts = [n for n, line in enumerate(lines) if line.startswith(_TRACEBACK.decode())]
        first = len(lines) - SHOWN
        return lines[max(0, min([first, *starts[-1:]]), len(lines) - 40) :]

    def sentence(self) -> str | None:
        """The last sentence of `moe-jax` itself."""
        own = [line for line in self.last_lines() if line.startswith("moe-jax: ")]
        return own[-1] if own else None

    @property
    def blames_a_peer(self) -> bool:
        return bool(_PEER.search(self._tail[-4096:]))

    @property
    def port_taken(self) -> bool:
        return bool(_PORT_TAKEN.search(self._tail))

    def _read(self) -> None:
        while True:
            ready = select.select([self._pipe], [], [], _IDLE)[0]
            data = os.read(self._pipe, 1 << 16) if ready else None
            if data:
                self._waiting = (self._waiting + data)[-KEPT:]
                self._tail = (self._tail + data)[-TAIL:]
            self._store()
            if self._terminal is not None:
                self._show(data, self._terminal)
            if data == b"":
                break
        if self._handle is not None:
            self._handle.close()
        os.close(self._pipe)

    def _store(self) -> None:
        """Writes what waits. A log that cannot be written is said once; the pipe is emptied all the
        same, or its process would stand still.
        """
        if self._broken:
            return
        try:
            if self._handle is None:
                path = self._file()
                if path is None:
                    return
                path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = path.open("ab", buffering=0)
            self._handle.write(self._waiting)
            self._waiting = b""
        except OSError as error:
            self._broken = True
            print(f"moe-jax launch: no log from here on: {error}", file=sys.stderr, flush=True)

    def _show(self, data: bytes | None, terminal: BinaryIO) -> None:
        """Shows whole lines and, at once, one that has not ended, unless it may become one that is
        hidden. `data` is None where nothing came for a while, and empty at the end.
        """
        *lines, rest = (self._line + (data or b"")).split(b"\n")
        shown = b""
        for line in lines:
            shown += line + b"\n" if self._begun else self._chosen(line + b"\n")
            self._begun = False
        if self._trace and data != b"" and time.monotonic() - self._trace_since > _LIVES:
            shown, self._trace = self._trace + shown, b""
        settled = self._begun or not data or b"\r" in rest or rest[:1] not in _UNDECIDED
        if rest and settled and not self._trace and not _DUMP.match(rest):
            # What draws a bar is no beginning of a line: words may follow that have to be hidden.
            shown, rest, self._begun = shown + rest, b"", not rest.endswith(b"\r")
            self._after_dump = False
        self._line = rest
        if shown:
            try:
                terminal.write(shown)
                terminal.flush()
            except (OSError, ValueError):  # the terminal has gone; the log goes on
                self._terminal = None

    def _chosen(self, line: bytes) -> bytes:
        """The line, or nothing: a traceback waits until its process turns out to live."""
        bar, line = _after_progress(line)
        if line.startswith(_TRACEBACK):
            self._trace += line
            self._trace_since = time.monotonic()
            return bar
        if self._trace and not line.startswith(b"moe-jax: "):
            self._trace += line
            return bar
        dump = bool(_DUMP.match(line)) or (self._after_dump and not line.strip())
        self._after_dump = dump
        if dump or _SAID.match(line):
            return bar
        self.told_user |= line.startswith((b"moe-jax: ", b"Error: "))
        return bar + line


def _after_progress(line: bytes) -> tuple[bytes, bytes]:
    """A line in two: what draws a progress bar, and what is left for words."""
    match = _BAR.match(line)
    end = match.end() if match else 0
    return line[:end], line[end:]


def terminal_stderr() -> BinaryIO | None:
    """Where lines of process 0 go: this process's stderr, if it has one."""
    return None if sys.stderr is None else sys.stderr.buffer
