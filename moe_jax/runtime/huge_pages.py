"""Large memory pages for XLA on Linux CPUs, where each step allocates its temporaries again.

Filling fresh 4 KiB pages took up to a fifth of a step (docs/log.md). glibc backs large allocations
by huge pages if a variable says so before the process starts, so a program that will compute on CPU
starts itself once more. Needs only the standard library.
"""

from __future__ import annotations

import os
import sys

TUNABLES_VARIABLE = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb=1"


def restart_with_huge_pages() -> None:
    """Replaces this process by the same program with huge pages. Does nothing on other systems than
    Linux, or if the variable is set.

    Call it first in a program's entry point: nothing that was done before remains. The process
    keeps its number. Without glibc 2.35 the setting has no effect.
    """
    if sys.platform == "linux" and TUNABLES_VARIABLE not in os.environ and sys.executable:
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, TUNABLES_VARIABLE: SETTING})
