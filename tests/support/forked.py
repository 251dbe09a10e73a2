"""Processes that a signal hits at a chosen moment, forked from one that has imported everything:
imports take most of a process's time.

Nothing may have started JAX before the fork.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


def never(*arguments: Any) -> bool:
    return False


def signal_around(
    owner: Any,
    name: str,
    number: int,
    *,
    before: Callable[..., Any] = never,
    after: Callable[..., Any] = never,
) -> None:
    """Makes `owner.name` send this process a signal before or after the calls that are chosen by
    their arguments.
    """
    real = getattr(owner, name)

    def deadly(*arguments: Any, **options: Any) -> Any:
        if before(*arguments):
            os.kill(os.getpid(), number)
        result = real(*arguments, **options)
        if after(*arguments):
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, deadly)


def exit_codes(names: Iterable[str], run: Callable[[str], None]) -> dict[str, int]:
    """Runs `run(name)` in a child per name, two at a time, and returns how each ended."""
    warnings.filterwarnings("ignore", message=".*fork")
    waiting, running, codes = list(names), dict[int, str](), dict[str, int]()
    while waiting or running:
        while waiting and len(running) < 2:
            name = waiting.pop(0)
            if pid := os.fork():
                running[pid] = name
            else:
                run_child(run, name)
        pid, status = os.wait()
        codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
    return codes


def run_child(run: Callable[[str], None], name: str) -> NoReturn:
    code = 99
    try:
        run(name)
        code = 0
    except SystemExit as leave:
        assert isinstance(leave.code, int)
        code = leave.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
