"""Writes what process 1 of a launched run says of itself, as tracking does, once it runs.

python -m tests.support.phase_writer FOLDER RUN_DIR
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    folder, run_dir = Path(sys.argv[1]), Path(sys.argv[2])
    names = [folder / "pid_1", folder / "pid_2", folder / "up"]
    while not all(name.exists() for name in names):
        time.sleep(0.01)
    state = {"pid": int(names[0].read_text()), "phase": "step", "step": 15}
    (run_dir / "processes" / "process_1.json").write_text(json.dumps(state))
    (folder / "state").touch()
