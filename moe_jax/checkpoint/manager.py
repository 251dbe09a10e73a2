"""Checkpoints: saved in the background by Orbax, sealed with checksums, restored onto any mesh.

    checkpoints = Checkpoints(run_dir / "checkpoints", keep_last=2, keep_best=1)
    checkpoints.save(step, state, meta, val_loss)   # returns once the state is copied to the host
    state, meta, step, skipped = checkpoints.restore_latest(target)
    checkpoints.close()                             # waits; raises what the last save has to say;
                                                    # or use it as a context manager

A step is a directory `step_00000100` with `state/` (Orbax), `meta.json`, `manifest.json` and
`manifest.b2`. It is written as `step_00000100.partial`; renaming it, after everything in it has
reached the disk, is what makes it count. A kill at any moment therefore leaves the earlier steps as
they were and at most a `.partial` directory, which the next save removes. Opening a directory
changes nothing in it, so a run can be read while it trains.

Where the file system does not rename directories (buckets mounted by gcsfuse, some network
folders), an empty file `step_00000100.committed` beside the `.partial` directory makes it count.

Several processes need a file system that they share; `save`, `wait`, `close` and the restores are
then called by all of them, in the same order.

Orbax's CheckpointManager (0.12.8) names, keeps and removes steps too, but nothing that it restores
is compared with what was saved: of 24 bits flipped one by one in an array's file, all came back as
other numbers without an error. It also refuses to save a step that is there already, which a run
that went back does. Its policies LatestN and BestN are not quite our rule (BestN keeps steps
without a loss while there are no more than N), and would replace four lines of `_prune`.

The suffixes are the format's own and not those of utils/files.py: a step that is being replaced
must still count until its successor does.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_jax.checkpoint import agreement, integrity, orbax_io
from moe_jax.checkpoint.read_state import SlotSources, moved_slots, read_proven
from moe_jax.checkpoint.steps import COMMITTED, saved_steps, step_path
from moe_jax.errors import CorruptCheckpoint, UserError
from moe_jax.utils.progress import say

CHECKPOINT_FORMAT = 1


# Numbers the saves of this process, which are in the same order on every process.
_saves = itertools.count()


class Restored(NamedTuple):
    """What `restore_latest` gives."""

    state: Any
    meta: dict[str, Any]
    step: int
    skipped: list[str]  # One sentence for each newer checkpoint that was damaged; empty as a rule.


class Checkpoints:
    """The checkpoints of one run. Only one process group may save into a directory at a time.

    A save has stages: the directory is made ready, arrays are copied and their writing begins, and,
    in the background, the step is committed. Where a stage fails, `_error` goes through three
    states: None while all is well here; this process's exception once it failed, unknown to the
    others (kept by `_together` or, in the background, by `_finish`); and None again after `_agree`,
    where the processes tell each other whether any failed and every one of them raises.
    """

    def __init__(self, directory: Path, keep_last: int, keep_best: int) -> None:
        """Keep the `keep_last` newest steps and the `keep_best` of lowest validation loss."""
        # Orbax asks for an absolute path.
        self.directory = Path(directory).absolute()
        self._keep_last, self._keep_best = keep_last, keep_best
        self._thread: threading.Thread | None = None
        self._saving = 0
        self._digests = ""  # the name under which the processes tell theirs of that save
        self._error: Exception | None = None

    # Looking

    def steps(self) -> list[int]:
        """The steps that count, ascending; whether their bytes are still good shows when they are
        read.
        """
        return saved_steps(self.directory)

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def partial_steps(self) -> list[int]:
        """Steps whose save or removal is under way or was cut short; they do not count."""
        names = (re.fullmatch(r"step_(\d+)\.partial", path.name) for path in self._entries())
        partial = (int(match[1]) for match in names if match)
        return sorted(step for step in partial if not self._path(step, COMMITTED).exists())

    def read_meta(self, step: int) -> dict[str, Any]:
        """The `meta` of a step. Raises `CorruptCheckpoint` where its bytes are not those
        written.
        """
        with self._remedy(step):
            path = self._find(step)
            return json.loads(integrity.read_sealed(path, "meta.json", _read_manifest(path)))

    def verify(self, step: int) -> None:
        """Raises `CorruptCheckpoint` where the files of a step are not those that were written."""
        with self._remedy(step):
            path = self._find(step)
            self._verify_files(path, _read_manifest(path))

    # Saving

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        val_loss: float | None = None,
        wait: bool = False,
    ) -> None:
        """Save a pytree of `jax.Array`s; returns once they are copied, so the caller may donate
        them at once.

        Errors of the save before surface here, or in `wait` or `close`, whichever comes first. The
        same step saved again is replaced. Steps after this one are removed with it: a run that went
        back has left them. Raises `UserError` for a full disk or a directory that cannot be
        written; earlier steps stay intact.
        """
        self.wait()
        text = json.dumps(meta)
        arrays = orbax_io.flatten(state)
        for path, leaf in arrays.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(
                    f"{path} of the state is {type(leaf).__name__}, not a jax.Array: put it into "
                    f"meta or on the mesh"
                )
        stored = {
            path: array for path, array in arrays.items() if array.size
        }  # Orbax refuses empty arrays.
        loss = val_loss if val_loss is not None and math.isfinite(val_loss) else None
        # Nothing that the background thread gets may hold the state's arrays: their memory is the
        # next step's.
        described = integrity.describe(arrays, orbax_io.has_slots)
        content = {"format": CHECKPOINT_FORMAT, "step": step, "val_loss": loss, "arrays": described}
        self._saving, self._digests = step, f"digests of save {next(_saves)}"
        partial = self._path(step, ".partial")
        with self._together():
            self._prepare(partial, sum(array.nbytes for array in stored.values()))
        with self._together():
            writing = orbax_io.Writing(partial / "state", stored)
        self._thread = threading.Thread(
            target=self._finish,
            args=(writing, step, text, content),
            name=f"save step {step}",
        )
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, if any, and raise its error, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._agree()

    def close(self) -> None:
        """Wait, as every program must before it ends: a save that is left alone at exit may not
        become whole.
        """
        self.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """`close`. Where several processes end with an error, which may be one's alone, they do not
        agree on anything: with a `UserError` the save under way still becomes whole, with another
        one, such as that a process has gone, nobody waits for it.
        """
        if error is None or jax.process_count() == 1:
            self.close()
        elif isinstance(error, UserError) and self._thread is not None:
            self._thread.join()
            if jax.process_index() != 0:
                agreement.hear(self._digests, 0)  # told when all is done
            if self._error is not None:
                say(str(self._explained(self._error)))

    def _prepare(self, partial: Path, size: int) -> None:
        """Remove what killed saves left, see that the disk has room, make the directory to write
        into.
        """
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clean()
            if partial.exists():  # committed by a marker: the same step once more
                self._remove(self._saving)
            # before the room is measured: a read-only disk has none, and says so
            partial.mkdir()
            (partial / "state").mkdir()
            disk = shutil.disk_usage(self.directory)
            if disk.total and disk.free < size:  # a bucket has no size
                raise OSError(
                    errno.ENOSPC,
                    f"{size / 1e6:.1f} MB are needed, {disk.free / 1e6:.1f} MB are free",
                )

    def _clean(self) -> None:
        for path in self._entries():
            final, committed = path.with_suffix(""), path.with_suffix(COMMITTED).exists()
            if (path.suffix == ".partial" and not committed) or (path.suffix == "" and committed):
                shutil.rmtree(path)
            elif path.suffix == ".replaced":
                if final.exists() or committed:
                    shutil.rmtree(path)
                else:  # Killed between the two renames of `_commit`.
                    path.rename(final)

    def _finish(
        self, writing: orbax_io.Writing, step: int, meta: str, content: dict[str, Any]
    ) -> None:
        """In the background: wait for this process's files and hash them; on the first process,
        when the others have told theirs, make the step count. Keeps an error for `_agree`.
        """
        partial, process, mine = self._path(step, ".partial"), jax.process_index(), None
        try:
            writing.wait()
            if process != 0:
                files = integrity.list_files(partial)
                files = [path for path in files if integrity.writer_of(path) == process]
                mine = integrity.digest_files(partial, files)
                return
            told = [agreement.hear(self._digests, other) for other in range(1, jax.process_count())]
            if None not in told:  # else one has failed, which `_agree` tells
                writing.merge()
                self._commit(step, meta, content, {k: v for one in told for k, v in one.items()})
                self._prune(step)
        except Exception as error:
            self._error = error
        finally:
            agreement.tell(self._digests, mine)

    def _commit(self, step: int, meta: str, content: dict[str, Any], known: dict[str, Any]) -> None:
        partial, final, replaced = (
            self._path(step, suffix) for suffix in (".partial", "", ".replaced")
        )
        integrity.write_durably(partial / "meta.json", meta)
        integrity.seal_directory(partial, content, known)
        try:
            if final.exists():
                final.rename(replaced)  # Still counts as the step until the next line is done.
            partial.rename(final)
            superseded = [replaced]
        except OSError:
            if not partial.is_dir():
                raise
            # Where this fails too, it is not the renaming that is refused.
            integrity.write_durably(self._path(step, COMMITTED), "")
            _say_how_steps_are_committed(self.directory)
            superseded = [final, replaced]
        integrity.flush_folder(self.directory)
        for path in superseded:
            if path.exists():
                shutil.rmtree(path)

    def _prune(self, saved: int) -> None:
        """Remove steps that the run has left or that are neither among the newest nor among the
        best.
        """
        steps = [step for step in self.steps() if step <= saved]
        losses = {step: loss for step in steps if (loss := self._val_loss(step)) is not None}
        best = sorted(losses, key=lambda step: (losses[step], -step))[: self._keep_best]
        keep = {*steps[-self._keep_last :], *best}
        for step in self.steps():
            if step not in keep:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Removes a step, which first ceases to count, so that the removal may be cut short."""
        path, doomed = self._find(step), self._path(step, ".partial")
        if path == doomed:
            self._path(step, COMMITTED).unlink()
        else:
            try:
                path.rename(doomed)
            except OSError:  # a copy of another file system's, on one that does not rename
                doomed = path
        shutil.rmtree(doomed)

    def _val_loss(self, step: int) -> float | None:
        try:
            return integrity.read_manifest(self._find(step)).get("val_loss")
        except CorruptCheckpoint:
            return None  # Restoring it says so; here it only cannot be among the best.

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A stage of a save that fails on all processes if it fails on one; without this the
        others would wait for it.
        """
        try:
            yield
        except Exception as error:
            self._error = error
        self._agree()

    def _agree(self) -> None:
        """Raise the error of this process's save or, so that no process runs on alone, that of
        another's.
        """
        cause, self._error = self._error, None
        try:
            agreement.raise_together(None if cause is None else self._explained(cause))
        except Exception as failure:
            if jax.process_index() == 0 and self._saving in self.partial_steps():
                shutil.rmtree(
                    self._path(self._saving, ".partial"), ignore_errors=True
                )  # What resists goes with the next save.
            if failure is cause:
                raise
            raise failure from cause

    def _explained(self, error: Exception) -> Exception:
        """What went wrong with a save in words, as far as there are any."""
        error = orbax_io.explain(error, self._saving, self.directory) or error
        if isinstance(error, UserError) and jax.process_count() > 1:
            return UserError(f"process {jax.process_index()}: {error}")
        return error

    # Restoring

    def restore(
        self, step: int, target: Any, sources: SlotSources | None = None, subset: bool = False
    ) -> Any:
        """The state of a step with the structure, dtypes and shardings of `target`, every byte of
        it verified: each file by one process, what was read of each array by all of them.

        `target` is a pytree of `jax.ShapeDtypeStruct` with `NamedSharding`s, on any mesh. Each
        process reads what its devices will hold, of an array that has other slots than those stored
        (`sources`) too. With `subset` the target may leave arrays out, such as the optimizer's for
        sampling. Raises `CorruptCheckpoint` naming the file or array that is damaged, `UserError`
        for no such step and for arrays that are missing, unexpected, or of another dtype or shape.
        """
        self.wait()
        with self._remedy(step):
            path = self._find(step)
            manifest = _read_manifest(path)
            wanted, stored = orbax_io.flatten(target), manifest["arrays"]
            moved = moved_slots(wanted, sources)
            orbax_io.match(path, wanted, stored, moved, subset)
            self._verify_files(path, manifest)
            arrays = read_proven(path, wanted, stored, moved)
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted])

    def _verify_files(self, path: Path, manifest: dict[str, Any]) -> None:
        """This process's share of them; raises on all where one finds damage."""
        process, processes = jax.process_index(), jax.process_count()
        agreement.by_all(lambda: integrity.verify_directory(path, manifest, process, processes))

    def restore_latest(
        self,
        target: Any,
        sources: Callable[[dict[str, Any]], SlotSources] | None = None,
        step: int | None = None,
        fallback: bool = False,
        subset: bool = False,
        known: tuple[int, dict[str, Any]] | None = None,
    ) -> Restored:
        """Restore the newest step, or `step`; with `fallback`, the newest before it that is not
        damaged.

        `sources` makes, from a checkpoint's meta, what `restore` takes. `known` is a step with the
        meta that was read of it already.

        Raises `UserError` where there is no checkpoint, `CorruptCheckpoint` for a damaged one (with
        `fallback`: when all are damaged), and what `restore` raises.
        """
        self.wait()
        steps = self.steps()
        if not steps:
            raise UserError(
                f"there is no checkpoint in {self.directory}: train first, or name another run "
                f"directory."
            )
        last = steps[-1] if step is None else step
        skipped: list[str] = []
        for candidate in [
            last,
            *(earlier for earlier in reversed(steps) if earlier < last and fallback),
        ]:
            try:
                meta = known[1] if known and known[0] == candidate else self.read_meta(candidate)
                state = self.restore(
                    candidate, target, None if sources is None else sources(meta), subset
                )
                return Restored(state, meta, candidate, skipped)
            except CorruptCheckpoint as error:
                if not fallback:
                    raise
                skipped.append(str(error.__cause__))
        raise CorruptCheckpoint(
            f"no checkpoint in {self.directory} is whole ({'; '.join(skipped)}): restore the "
            f"files from a copy or train again."
        )

    # Paths

    def _entries(self) -> list[Path]:
        return sorted(self.directory.glob("step_*"))

    def _path(self, step: int, suffix: str = "") -> Path:
        return step_path(self.directory, step, suffix)

    def _find(self, step: int) -> Path:
        committed = self._path(step, COMMITTED).exists()
        for suffix in (".partial", "", ".replaced") if committed else ("", ".replaced"):
            if (path := self._path(step, suffix)).is_dir():
                return path
        others = ", ".join(map(str, self.steps())) or "none"
        raise UserError(
            f"there is no checkpoint of step {step} in {self.directory} (there are: {others}): "
            f"choose another."
        )

    @contextmanager
    def _remedy(self, step: int) -> Iterator[None]:
        """Add to a `CorruptCheckpoint` what can be done about it."""
        try:
            yield
        except CorruptCheckpoint as error:
            if step not in self.steps():  # Pruned while it was read: nothing is damaged.
                raise UserError(
                    f"the run in {self.directory} has just removed step {step} for newer ones: "
                    f"try again."
                ) from error
            earlier = [other for other in self.steps() if other < step]
            remedy = (
                f"--fallback takes step {earlier[-1]} instead"
                if earlier
                else "restore it from a copy or train again"
            )
            raise CorruptCheckpoint(f"{error}: {remedy}.") from error


@functools.cache
def _say_how_steps_are_committed(directory: Path) -> None:
    say(
        f"{directory}: the file system does not rename folders, so a checkpoint counts by a file "
        f"step_N{COMMITTED} beside its folder step_N.partial: keep both."
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = integrity.read_manifest(path)
    if manifest["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} has checkpoint format {manifest['format']}, this version reads "
            f"{CHECKPOINT_FORMAT}: use the version that wrote it."
        )
    return manifest
