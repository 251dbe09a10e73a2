"""A process that `moe-jax launch` started ends with it, however that ends.

`launch` names itself in the environment; the program looks there first of all. On Linux the kernel
keeps watch: it kills a process whose parent has gone, a stopped one too, and no thread of ours has
to get its turn for that. The program asks for it itself, because code between fork and exec of a
parent with threads may block. Elsewhere a thread looks once a second who its parent is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT_VARIABLE = "MOE_JAX_LAUNCH"  # the number of the process that started this one
_PR_SET_PDEATHSIG = 1


def end_with_launch() -> None:
    """Ties this process to the `moe-jax launch` that started it, if one did; its own children are
    not tied.
    """
    text = os.environ.pop(PARENT_VARIABLE, None)
    if text is None:
        return
    parent = int(text)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()
    if os.getppid() != parent:  # it ended before we asked
        os._exit(128 + signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(128 + signal.SIGKILL)
