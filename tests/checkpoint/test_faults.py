"""What can happen to a checkpoint: damage is refused, a save that was cut short does not count, and
earlier steps stay.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.errors import CorruptCheckpoint, UserError
from moe_jax.runtime.quiet import quiet_checkpoints
from tests.support.command import run_module
from tests.support.killed_saves import MOMENTS
from tests.support.saved_state import assert_same, make_state, mesh, saved, step_path, target_of
from tests.support.small_disk import mounted


def all_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_a_flipped_bit_at_any_of_200_places_is_refused_with_the_file_named(tmp_path: Path) -> None:
    """Of arrays and of metadata alike: each file several times, large ones more often."""
    saved(tmp_path, 1)
    target = target_of(make_state(mesh(2, 4)), mesh(2, 4))
    rng = np.random.default_rng(0)
    files = [path for path in all_files(tmp_path) if path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files], float)
    chosen = rng.choice(len(files), 200 - 3 * len(files), p=sizes / sizes.sum())
    for path in [*3 * files, *(files[i] for i in chosen)]:
        whole = path.read_bytes()
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        with pytest.raises(CorruptCheckpoint, match=path.name):
            Checkpoints(tmp_path, 1, 0).restore(1, target)
        path.write_bytes(whole)
    assert_same(Checkpoints(tmp_path, 1, 0).restore(1, target), make_state(mesh(2, 4), 1))


@pytest.mark.parametrize("harm", ["truncate", "remove", "add"])
def test_truncated_missing_and_extra_files_are_refused(tmp_path: Path, harm: str) -> None:
    saved(tmp_path / "good", 1)
    target = target_of(make_state(mesh(2, 4)), mesh(2, 4))
    for path in all_files(tmp_path / "good"):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "good", copy)
        harmed = copy / path.relative_to(tmp_path / "good")
        if harm == "truncate":
            os.truncate(harmed, harmed.stat().st_size // 2)
        elif harm == "remove":
            harmed.unlink()
        else:
            harmed = harmed.with_name("extra")
            harmed.write_bytes(b"")
        with pytest.raises(CorruptCheckpoint) as caught:
            Checkpoints(copy, 1, 0).restore(1, target)
        assert harmed.name in str(caught.value)


def test_fallback_takes_the_newest_good_step_and_says_what_it_skipped(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3)
    target = target_of(make_state(mesh(2, 4)), mesh(2, 4))
    for step in (2, 3):
        (step_path(tmp_path, step) / "meta.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match=r"meta\.json .*--fallback takes step 2"):
        checkpoints.restore_latest(target)
    found = checkpoints.restore_latest(target, fallback=True)
    assert (found.step, found.meta) == (1, {"step": 1})
    assert [
        "step_0000000" + step in note for step, note in zip("32", found.skipped, strict=True)
    ] == [True, True]
    assert_same(found.state, make_state(mesh(2, 4), 1))
    (step_path(tmp_path, 1) / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"no checkpoint in .* is whole"):
        checkpoints.restore_latest(target, fallback=True)
    with pytest.raises(CorruptCheckpoint, match="train again"):
        checkpoints.restore_latest(target, step=1)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory for each moment, left by a process that was killed then."""
    root = tmp_path_factory.mktemp("killed")
    done = run_module("killed_saves", root, *MOMENTS)
    assert (json.loads(done.stdout), done.stderr) == (dict.fromkeys(MOMENTS, -signal.SIGKILL), "")
    return root


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.slow
def test_a_kill_during_a_save_leaves_the_step_before_as_latest(killed: Path, moment: str) -> None:
    directory = killed / moment
    step, seed = MOMENTS[moment]
    target = target_of(make_state(mesh(2, 4)), mesh(2, 4))
    checkpoints = Checkpoints(directory, keep_last=9, keep_best=0)
    found = checkpoints.restore_latest(target)
    assert (found.step, found.meta, found.skipped) == (step, {"step": seed}, [])
    assert_same(found.state, make_state(mesh(2, 4), seed))
    checkpoints.save(3, make_state(mesh(2, 4), 3), {}, wait=True)
    # The first save swept up what the killed one left, and nothing that counted.
    assert checkpoints.partial_steps() == []
    assert {path.name for path in directory.iterdir()} == {
        f"step_{kept:08d}" for kept in checkpoints.steps()
    }
    assert_same(checkpoints.restore(step, target), make_state(mesh(2, 4), seed))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 2 MB."""
    with mounted(tmp_path / "disk", "2m") as disk:
        yield disk


@pytest.mark.parametrize("noticed", ["before", "while writing"])
def test_a_full_disk_is_one_sentence_and_earlier_steps_stay(
    small_disk: Path,
    noticed: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    quiet_checkpoints()
    checkpoints = saved(small_disk, 1)
    noise = np.random.default_rng(0).standard_normal((8, 1024, 128), np.float32)
    large = {
        str(i): jax.device_put(part, NamedSharding(mesh(2, 4), PartitionSpec("expert")))
        for i, part in enumerate(noise)
    }
    if noticed == "while writing":
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40)
        )
    with pytest.raises(UserError, match=r"the disk of .* is too full to save step 2"):
        checkpoints.save(2, large, {})
        checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.partial_steps()) == ([1], [])
    checkpoints.save(3, make_state(mesh(2, 4), 3), {}, wait=True)
    assert_same(
        checkpoints.restore(3, target_of(make_state(mesh(2, 4)), mesh(2, 4))),
        make_state(mesh(2, 4), 3),
    )
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_what_a_desktop_leaves_in_a_checkpoint_is_no_damage(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    for folder in (tmp_path, step_path(tmp_path, 1), step_path(tmp_path, 1) / "state"):
        (folder / ".DS_Store").write_bytes(b"\0")
    state = make_state(mesh(2, 4), 1)
    assert_same(checkpoints.restore(1, target_of(state, mesh(2, 4))), state)


def test_a_read_only_disk_is_not_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no free space either."""
    checkpoints, mkdir = saved(tmp_path, 1), Path.mkdir

    def refuse(path: Path, *rest: object, **options: object) -> None:
        if path.suffix == ".partial":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *rest, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    full = shutil._ntuple_diskusage(2**40, 2**40, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match=r"step 2 cannot be saved .* is read-only: name another"):
        checkpoints.save(2, make_state(mesh(2, 4), 2), {}, wait=True)
    assert checkpoints.steps() == [1]


def test_a_directory_that_is_read_only_is_read_and_not_written(small_disk: Path) -> None:
    checkpoints = saved(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    state = make_state(mesh(2, 4), 1)
    with pytest.raises(UserError, match=r"step 2 cannot be saved .* is read-only: name another"):
        checkpoints.save(2, state, {}, wait=True)
    found = checkpoints.restore_latest(target_of(state, mesh(2, 4)))
    assert (found.step, checkpoints.partial_steps()) == (1, [])
    assert_same(found.state, state)
