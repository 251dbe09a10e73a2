"""Large memory pages for XLA on Linux CPUs, which allocates a step's temporaries anew each time.

Filling fresh 4 KiB pages took up to a fifth of a step (docs/log.md). glibc backs large allocations
by huge pages when told to before a process starts, so a program that will compute on CPU starts
itself once more. Needs the standard library alone.
"""

from __future__ import annotations

import os
import sys

TUNABLES_VARIABLE = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb=1"


def restart_with_huge_pages() -> None:
    """Replaces this process by the same program with huge pages; does nothing off Linux or where
    the variable is set.

    Call it first thing in a program's entry point: nothing that was done before remains. The
    process keeps its number. Without glibc 2.35 the setting has no effect.
    """
    if sys.platform == "linux" and TUNABLES_VARIABLE not in os.environ and sys.executable:
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, TUNABLES_VARIABLE: SETTING})
