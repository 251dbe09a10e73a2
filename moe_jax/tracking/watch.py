"""A live view of a run in the terminal: `moe-jax watch RUN_DIR` follows its metrics.jsonl as it
grows.

It only reads files, so it can be started and stopped at any time, on any machine that sees them,
and does not disturb the run.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.live import Live

from moe_jax.tracking.follow import FollowedRun
from moe_jax.tracking.run_dir import require_run_or_start
from moe_jax.tracking.watch_frame import draw


def watch(run_dir: Path, *, once: bool = False, interval: float = 2.0) -> None:
    """Shows a run until it ends or Ctrl-C; with `once`, or if stdout is not a terminal, prints one
    frame.

    Looks for new lines every `interval` seconds. A run that has not begun is waited for. Raises
    UserError for a folder that is no run, where there is nothing to print one frame of, and where a
    file is damaged.
    """
    console = Console(highlight=False)
    once = once or not console.is_terminal
    empty = run_dir.is_dir() and not any(run_dir.iterdir())  # a run may be about to begin there
    if (once or run_dir.exists()) and not empty:
        require_run_or_start(run_dir)
    with closing(FollowedRun(run_dir)) as run:
        run.read()
        if once:
            console.print(draw(run, console.size, console.options.ascii_only))
            return
        try:
            with Live(console=console, auto_refresh=False) as live:
                over = False
                while not over:
                    over = run.over
                    live.update(draw(run, console.size, console.options.ascii_only), refresh=True)
                    if not over:
                        time.sleep(interval)
                        run.read()
        except KeyboardInterrupt:
            console.print("Stopped watching; the run continues.")
