"""A process as `moe-jax launch` starts them, without JAX, that does what its arguments say.

python -m tests.support.launched FOLDER PROCESS SCRIPT: SCRIPT is words between semicolons, such as
`say=hello;await=go;kill=9`. FOLDER/pid_PROCESS holds its number.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from moe_jax.runtime.parent import end_with_launch


def main(folder: Path, process: str, script: str) -> None:
    """Runs the words of `script`, one after the other."""
    end_with_launch()
    signal.signal(signal.SIGTERM, lambda *_: (folder / f"saved_{process}").touch())
    signal.signal(
        signal.SIGINT, lambda *_: (folder / f"int_{process}_{time.monotonic_ns()}").touch()
    )
    (folder / f"pid_{process}.part").write_text(str(os.getpid()))
    (folder / f"pid_{process}.part").rename(folder / f"pid_{process}")
    for word in script.split(";"):
        name, _, value = word.partition("=")
        if name == "say":
            print(value, file=sys.stderr, flush=True)
        elif name == "bar":
            print(f"\r{value}\r", end="", file=sys.stderr, flush=True)
        elif name == "out":
            print(value, flush=True)
        elif name == "read":
            print(sys.stdin.readline().strip(), flush=True)
        elif name == "make":
            (folder / value).parent.mkdir(parents=True, exist_ok=True)
            (folder / value).touch()
        elif name == "await":
            while not (folder / value).exists():
                time.sleep(0.01)
        elif name == "interrupted":
            while not list(folder.glob(f"int_{process}_*")):
                time.sleep(0.01)
            time.sleep(0.2)  # for a second one
        elif name == "grow":
            os.kill(os.getppid(), signal.SIGUSR2)
        elif name == "stop":
            os.kill(os.getppid(), signal.SIGTERM)
        elif name == "kill":
            os.kill(os.getpid(), int(value))
        elif name == "exit":
            raise SystemExit(int(value))
        elif name:
            raise ValueError(word)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
