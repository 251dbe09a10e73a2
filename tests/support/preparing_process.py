"""Prepares SOURCE by two processes into FOLDER/two, prints the numbers of two more and waits to be
killed: python -m tests.support.preparing_process SOURCE FOLDER
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

from moe_jax.config.schema import DataConfig
from moe_jax.data import sources
from moe_jax.data.prepare import prepare
from moe_jax.runtime.workers import worker_processes

if __name__ == "__main__":
    source, folder = sys.argv[1], Path(sys.argv[2])
    sources.PIECE_BYTES = 1_000
    prepare(DataConfig(source=source), folder / "two", workers=2)
    with worker_processes(2) as run:
        for _ in run(time.sleep, [0.0, 0.0]):
            pass
        workers = [process.pid for process in multiprocessing.active_children()]
        print(json.dumps([number for number in workers if number != os.getpid()]), flush=True)
        time.sleep(600)
