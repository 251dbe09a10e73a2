"""Damage to the checkpoints of real runs, and disks that cannot be written, for scripts/faults.py.

Damage at many places is looked for in this process, by the function that a run restores with; what
a run says of it, and that it goes on from the step before, is seen in real processes once per row.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fault_runs import (
    EVERY,
    STEPS,
    Bench,
    Outcome,
    faults_of,
    newest_step,
    saved,
)

PLACES = 200
NEWEST = f"step_{STEPS:08d}"


class Reader:
    """Restores a run's newest checkpoint as a run does, and compares it with what was saved."""

    def __init__(self, checkpoints: Path) -> None:
        """`checkpoints` is the folder of a run that nothing has harmed."""
        import jax

        jax.config.update("jax_platforms", "cpu")
        from moe_jax.checkpoint import integrity
        from moe_jax.runtime.quiet import quiet_checkpoints

        quiet_checkpoints()
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        arrays = integrity.read_manifest(checkpoints / NEWEST)["arrays"]
        self._target = {
            name: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"], sharding=whole)
            for name, entry in arrays.items()
        }
        self._good = {step: self._arrays(checkpoints, step)[0] for step in saved_of(checkpoints)}

    def _arrays(self, checkpoints: Path, step: int | None = None) -> tuple[Any, int, list[str]]:
        import jax

        from moe_jax.checkpoint.manager import Checkpoints

        manager = Checkpoints(checkpoints, STEPS, 0)
        found = manager.restore_latest(self._target, step=step, fallback=step is None)
        values = {name: bytes(jax.device_get(x).data) for name, x in found.state.items()}
        return values, found.step, found.skipped

    def wrong(self, checkpoints: Path, harmed: Path) -> str | None:
        """What is wrong with a restore after a file of the newest step was harmed: nothing, where
        the step is refused with the file named and the values are those of the step before.
        """
        from moe_jax.errors import CorruptCheckpoint

        try:
            values, step, skipped = self._arrays(checkpoints)
        except CorruptCheckpoint as error:
            return f"{harmed.name}: {error}"
        if step != STEPS - EVERY or len(skipped) != 1:
            return f"{harmed.name}: step {step} was restored"
        if harmed.name not in skipped[0]:
            return f"{harmed.name} is not named: {skipped[0]}"
        return None if values == self._good[step] else f"{harmed.name}: other values"


def saved_of(checkpoints: Path) -> list[int]:
    """The last two steps of a run."""
    return saved(checkpoints.parent)[-2:]


def files_of(step: Path) -> list[Path]:
    """The files of a checkpoint that hold something."""
    return sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path: Path, place: int, bit: int) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


Harm = Callable[[Path, random.Random], None]


def flip_somewhere(path: Path, rng: random.Random) -> None:
    """Changes a bit of a file."""
    flip(path, rng.randrange(path.stat().st_size), rng.randrange(8))


def cut(path: Path, rng: random.Random) -> None:
    """Leaves a part of a file."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def remove(path: Path, rng: random.Random) -> None:
    """Removes a file."""
    path.unlink()


def harmed(harm: Harm, places: int | None) -> Callable[[Bench], Outcome]:
    """Damage to the newest checkpoint, in every file or at so many places over all of them."""

    def work(bench: Bench) -> Outcome:
        outcome, rng, run_dir = Outcome(), random.Random(bench.seed), bench.new_run()
        shutil.copytree(bench.undisturbed, run_dir)
        step = run_dir / "checkpoints" / NEWEST
        reader, files = Reader(run_dir / "checkpoints"), files_of(step)
        sizes = [path.stat().st_size for path in files]
        more = max((places or 0) - len(files), 0)
        for path in [*files, *rng.choices(files, sizes, k=more)]:
            whole = path.read_bytes()
            harm(path, rng)
            if problem := reader.wrong(run_dir / "checkpoints", path):
                outcome.wrong.append(problem)
            path.write_bytes(whole)
            outcome.times += 1
        largest = max(files, key=lambda path: path.stat().st_size)
        harm(largest, rng)
        _seen_by_a_run(bench, run_dir, largest.name, outcome)
        return outcome

    return work


def _seen_by_a_run(bench: Bench, run_dir: Path, named: str, outcome: Outcome) -> None:
    """Two processes refuse the step in one sentence; with --fallback they go on from the one
    before.
    """
    # With more steps, so that there is something to go on with.
    with bench.launch(run_dir, "--resume", restarts=3, train__steps=STEPS + 1) as launch:
        launch.finish()
        outcome.noticed.append(time.monotonic() - launch.began)
        outcome.wrong += faults_of(launch, run_dir, [], 2)
        sentences = [line for line in launch.text.splitlines() if line.startswith("moe-jax: ")]
        if len(sentences) != 1 or named not in sentences[0]:
            outcome.wrong.append(f"said: {launch.text[-300:]!r}")
    with bench.launch(run_dir, "--resume", "--fallback") as launch:
        launch.finish()
        outcome.wrong += faults_of(launch, run_dir, bench.curve)


def read_only(bench: Bench) -> Outcome:
    """The folder of the checkpoints cannot be written any more, in the middle of a run."""
    outcome, run_dir = Outcome(times=1), bench.new_run()
    with bench.launch(run_dir, restarts=3) as launch:
        launch.until("a checkpoint", lambda: saved(run_dir) or None)
        try:
            with frozen(run_dir / "checkpoints"):
                hit = time.monotonic()
                launch.finish()
                outcome.noticed.append(time.monotonic() - hit)
        except (OSError, subprocess.CalledProcessError) as error:
            outcome.skipped = f"{error}"
            return outcome
        _ends_well(bench, launch, run_dir, "read-only", outcome)
    return outcome


def full_disk(bench: Bench) -> Outcome:
    """The disk of a run is full, in the middle of a run."""
    disk, outcome = bench.new_run(), Outcome(times=1)
    try:
        with small_disk(disk, "64m"):
            run_dir = disk / "run"
            with bench.launch(run_dir, restarts=3) as launch:
                launch.until("a checkpoint", lambda: saved(run_dir) or None)
                fill(disk / "ballast")
                hit = time.monotonic()
                launch.finish()
                outcome.noticed.append(time.monotonic() - hit)
                (disk / "ballast").unlink()
                _ends_well(bench, launch, run_dir, "full|no space", outcome)
    except subprocess.CalledProcessError as error:
        outcome.skipped = f"a small file system needs root ({error.stderr.decode().strip()})"
    return outcome


def _ends_well(bench: Bench, launch: Any, run_dir: Path, named: str, outcome: Outcome) -> None:
    """A run that could not save ended with a sentence, and goes on where it can."""
    import re

    outcome.wrong += faults_of(launch, run_dir, [], 2)
    if not re.search(rf"moe-jax: .*({named})", launch.text):
        outcome.wrong.append(f"said: {launch.text[-300:]!r}")
    outcome.again.append(newest_step(run_dir) - max(saved(run_dir)))
    with bench.launch(run_dir, "--resume") as again:
        again.finish()
        outcome.wrong += faults_of(again, run_dir, bench.curve)


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """A folder that nobody writes to; the superuser, for whom modes mean nothing, mounts it."""
    if os.geteuid():
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    subprocess.run(["mount", "--bind", folder, folder], check=True, capture_output=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True, capture_output=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of that size. Raises CalledProcessError where it cannot be mounted."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
    subprocess.run(["mount", *options, folder], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(path: Path) -> None:
    """Writes a file until the disk has no room."""
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(1 << 16))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return


REFUSED = "`--resume` refuses it and names the file; `--fallback` takes the step before"
ONE = "one sentence, exit code 2, no restart; earlier checkpoints stay"
FLIPPED = "one bit flipped in the newest checkpoint"
ROWS: tuple[tuple[str, str, str, int, Callable[[Bench], Outcome]], ...] = (
    ("flip", FLIPPED, REFUSED, 6, harmed(flip_somewhere, PLACES)),
    ("truncate", "a file of it cut off", REFUSED, 4, harmed(cut, None)),
    ("missing", "a file of it missing", REFUSED, 4, harmed(remove, None)),
    ("read-only", "checkpoints cannot be written", ONE, 2, read_only),
    ("full-disk", "the disk is full", ONE, 2, full_disk),
)
