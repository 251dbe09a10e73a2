"""Processes that share work, and end with the one that started them however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

_AHEAD = 2  # tasks per process that are handed out before their results are asked for


@contextmanager
def worker_processes(count: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Gives a `map` over new processes, whose results come as they are ready; with one, over this
    process. Each of several has one thread for `tokenizers`, as they share the cores.

    The function and its values are pickled. An error ends the work: it is raised here, and the
    processes are stopped.
    """
    if count == 1:
        yield map
        return
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_begin_worker
    )
    try:
        yield lambda function, values: _as_ready(pool, function, values, count * _AHEAD)
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _as_ready(
    pool: ProcessPoolExecutor, function: Callable[..., Any], values: Iterable[Any], most: int
) -> Iterator[Any]:
    waiting = set()
    for value in values:
        waiting.add(pool.submit(function, value))
        if len(waiting) >= most:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is interrupted, and ends this
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
