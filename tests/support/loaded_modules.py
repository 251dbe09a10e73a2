"""What commands load: python -m tests.support.loaded_modules '[["--help"], ["train", "--help"]]'

Runs each command line of the JSON list in this process; prints its exit code and which of the
heavy packages are loaded after it, as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

from moe_jax.cli import main

HEAVY = ("jax", "matplotlib")


def run() -> None:
    results = []
    for arguments in json.loads(sys.argv[1]):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                main.main(arguments)
        except SystemExit as ended:
            results.append([ended.code, [name for name in HEAVY if name in sys.modules]])
    print(json.dumps(results))


if __name__ == "__main__":
    run()
