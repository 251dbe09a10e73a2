"""One process at a time trains into a run directory: a lock that ends with its process, however
that ends.

    with locked(run_dir):
        ...                      # a second `locked` elsewhere raises UserError at once
        check_shared(run_dir)    # of several processes of a run, each must see that lock
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_jax.errors import UserError
from moe_jax.runtime.distributed import (
    broadcast_text,
    hear_process,
    is_first,
    process_count,
    process_index,
    tell_processes,
)
from moe_jax.utils.files import NO_LOCKS
from moe_jax.utils.progress import say

LOCK_FILE = ".lock"
CLAIM_SECONDS = 120  # for all processes to see the run directory


@contextmanager
def locked(run_dir: Path, *, active: bool = True) -> Iterator[None]:
    """Holds the directory's lock, making the directory if need be; of a run that has not begun when
    the block ends, nothing is left.

    The system keeps the lock (flock), so it needs no clearing up after a kill. Of several processes
    of one run one is `active`; for the others nothing happens. Raises UserError where another run's
    process holds it.
    """
    if not active:
        yield
        return
    made = _make_folders(run_dir)
    path = run_dir / LOCK_FILE
    descriptor = _lock(path, run_dir)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        if not (run_dir / "config.yaml").exists():
            path.unlink(missing_ok=True)
            for folder in made:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
        os.close(descriptor)


def check_shared(directory: Path) -> None:
    """Raises UserError where a process does not see the directory that the first one holds."""
    lock, what = directory / LOCK_FILE, "sight of the run directory"
    held = broadcast_text("lock", lock.read_text() if is_first() else None, CLAIM_SECONDS)
    blind = "" if lock.exists() and lock.read_text() == held else socket.gethostname()
    tell_processes(what, blind)
    # All of them hear it, and not only the one at fault, so that the first can clear up.
    for process in range(process_count()):
        own = process == process_index()
        host = blind if own else hear_process(what, process, CLAIM_SECONDS)
        if host:
            raise UserError(
                f"--run-dir {directory} on {host} (process {process}) is not the directory that "
                f"process 0 has: name one that all processes share."
            )


def _make_folders(run_dir: Path) -> list[Path]:
    """Makes the directory; returns what was not there before, innermost first."""
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    return made


def _lock(path: Path, run_dir: Path) -> int:
    """The descriptor that holds the lock while it is open."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                say(
                    f"The file system of {run_dir} has no locks: take care that no other process "
                    f"trains there."
                )
                return descriptor
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise UserError(
                f"--run-dir {run_dir} is in use by another `moe-jax train` ({_holder(path)}): wait "
                f"until it ends, stop it, or name another directory."
            ) from error
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)  # a process that began no run has just removed the file


def _holder(path: Path) -> str:
    text = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    return text or "which has just begun"
