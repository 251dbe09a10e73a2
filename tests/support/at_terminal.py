"""A launch at a terminal of its own, where someone types a line and Ctrl-C.

python -m tests.support.at_terminal FOLDER SCRIPT...: as `launching`; shows the screen.
"""

from __future__ import annotations

import os
import pty
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    folder, scripts = Path(sys.argv[1]), sys.argv[2:]
    pid, screen = pty.fork()
    if pid == 0:
        program = [sys.executable, "-m", "tests.support.launching", *sys.argv[1:]]
        os.execv(sys.executable, program)
    while not all((folder / f"pid_{number}").exists() for number in range(len(scripts))):
        time.sleep(0.01)
    os.write(screen, b"typed\n")
    while not (folder / "typed").exists():
        time.sleep(0.01)
    os.write(screen, b"\x03")
    try:
        while data := os.read(screen, 1024):
            os.write(1, data)
    except OSError:  # how Linux says that nobody has the terminal open
        print(flush=True)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
