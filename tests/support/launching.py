"""`supervise` as a program of its own, with processes of `tests.support.launched`.

python -m tests.support.launching FOLDER SCRIPT...: one process for each script.
"""

from __future__ import annotations

import sys

from moe_jax.launch.processes import Job, supervise


def launched_arguments(folder: object, process: int, script: str) -> list[str]:
    """The command line of one such process."""
    return [sys.executable, "-m", "tests.support.launched", str(folder), str(process), script]


if __name__ == "__main__":
    folder, *scripts = sys.argv[1:]
    raise SystemExit(
        supervise(
            Job(("chat",), len(scripts)),
            arguments_of=lambda job, process, port: launched_arguments(
                folder, process, scripts[process]
            ),
        )
    )
