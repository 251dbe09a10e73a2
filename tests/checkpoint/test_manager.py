"""Checkpoints: what is saved comes back on any mesh, what is damaged is refused, what is
half-written does not count.
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
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.checkpoint import integrity, orbax_io
from moe_jax.checkpoint.manager import Adapt, Checkpoints
from moe_jax.errors import CorruptCheckpoint, UserError
from moe_jax.runtime.quiet import quiet_checkpoints
from tests.support.command import run_module
from tests.support.killed_saves import MOMENTS
from tests.support.saved_state import assert_same, make_state, mesh, target_of


def saved(
    directory: Path,
    *steps: int,
    keep_last: int = 9,
    keep_best: int = 0,
    losses: dict[int, float] | None = None,
) -> Checkpoints:
    checkpoints = Checkpoints(directory, keep_last, keep_best)
    for step in steps:
        checkpoints.save(
            step, make_state(mesh(2, 4), step), {"step": step}, (losses or {}).get(step), wait=True
        )
    return checkpoints


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def all_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(("data", "expert"), [(2, 4), (1, 1), (8, 1), (1, 2)])
def test_restores_on_any_mesh(tmp_path: Path, data: int, expert: int) -> None:
    state = make_state(mesh(2, 4))
    checkpoints = Checkpoints(tmp_path, 2, 0)
    checkpoints.save(7, state, {"data": {"epoch": 1}, "table": [[0, 1]]}, wait=True)
    target = target_of(state, mesh(data, expert))
    found = Checkpoints(tmp_path, 2, 0).restore(7, target)
    assert_same(found, state)
    assert jax.tree.all(jax.tree.map(lambda x, t: x.sharding == t.sharding, found, target))
    assert checkpoints.read_meta(7) == {"data": {"epoch": 1}, "table": [[0, 1]]}


def test_donating_the_state_after_save_changes_nothing(tmp_path: Path) -> None:
    """`save` returns before the bytes are on the disk; ten donating steps then overwrite the
    state.
    """
    sharding = NamedSharding(mesh(2, 4), PartitionSpec("expert", "data"))
    values = np.random.default_rng(0).standard_normal((512, 1024), np.float32)
    state = {str(i): jax.device_put(values + i, sharding) for i in range(8)}
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x * 2 + 1, state), donate_argnums=0)
    state = advance(state)
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    target = target_of(state, mesh(2, 4))
    checkpoints = Checkpoints(tmp_path, 1, 0)
    checkpoints.save(1, state, {})
    for _ in range(10):
        state = advance(state)
    checkpoints.close()
    assert_same(checkpoints.restore(1, target), expected)


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 2.5, 6: 4.0}
    checkpoints = saved(tmp_path, *losses, keep_last=2, keep_best=2, losses=losses)
    assert checkpoints.steps() == [2, 3, 5, 6]
    assert checkpoints.latest() == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step_{step:08d}" for step in (2, 3, 5, 6)
    ]


def test_save_of_an_earlier_step_replaces_what_the_run_left(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3, keep_last=2)
    assert checkpoints.steps() == [2, 3]
    state = make_state(mesh(2, 4), 99)
    checkpoints.save(2, state, {"again": True}, wait=True)
    assert checkpoints.steps() == [2]
    assert_same(checkpoints.restore(2, target_of(state, mesh(2, 4))), state)
    assert checkpoints.read_meta(2) == {"again": True}


def test_any_flipped_bit_is_refused_with_the_file_named(tmp_path: Path) -> None:
    saved(tmp_path / "good", 1)
    target = target_of(make_state(mesh(2, 4)), mesh(2, 4))
    rng = np.random.default_rng(0)
    for path in all_files(tmp_path / "good"):
        data = bytearray(path.read_bytes())
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "good", copy)
        if not data:
            data = bytearray(b"x")
        else:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (copy / path.relative_to(tmp_path / "good")).write_bytes(data)
        with pytest.raises(CorruptCheckpoint) as caught:
            Checkpoints(copy, 1, 0).restore(1, target)
        assert path.name in str(caught.value)


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


def test_values_are_verified_even_if_the_files_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault between the disk and the devices: what was read is not what the manifest says of the
    array.
    """
    checkpoints = saved(tmp_path, 1)
    state = make_state(mesh(2, 4), 1)
    read = orbax_io.read

    def faulty(path, asked):
        arrays = read(path, asked)
        arrays["params/embed"] = arrays["params/embed"].at[3, 3].add(1e-3)
        return arrays

    monkeypatch.setattr(orbax_io, "read", faulty)
    with pytest.raises(CorruptCheckpoint, match="array params/embed"):
        checkpoints.restore(1, target_of(state, mesh(2, 4)))


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


def test_nothing_to_restore_names_the_directory(tmp_path: Path) -> None:
    empty = Checkpoints(tmp_path / "none", 1, 0)
    assert (empty.steps(), empty.latest()) == ([], None)
    with pytest.raises(UserError, match=r"no checkpoint in .*none"):
        empty.restore_latest({})
    with pytest.raises(UserError, match=r"no checkpoint of step 5 .*there are: 1"):
        saved(tmp_path / "one", 1).restore_latest({}, step=5)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    state = make_state(mesh(2, 4))
    with pytest.raises(UserError, match="has no array more:"):
        checkpoints.restore(1, target_of(state | {"more": state["step"]}, mesh(2, 4)))
    fewer = {"params": state["params"]}
    with pytest.raises(UserError, match=r"has an array .* that the model does not"):
        checkpoints.restore(1, target_of(fewer, mesh(2, 4)))
    assert_same(
        checkpoints.restore(1, target_of(fewer, mesh(1, 2)), subset=True),
        {"params": make_state(mesh(2, 4), 1)["params"]},
    )
    with pytest.raises(UserError, match=r"array rng .* is uint32 where the model has int32"):
        checkpoints.restore(
            1, target_of(state | {"rng": state["rng"].astype(jnp.int32)}, mesh(2, 4))
        )
    wider = state | {"rng": jnp.concatenate([state["rng"], state["rng"]])}
    with pytest.raises(
        UserError, match=r"array rng .* has shape \(2,\) where the model has \(4,\)"
    ):
        checkpoints.restore(
            1,
            target_of(state, mesh(2, 4))
            | {"rng": jax.ShapeDtypeStruct((4,), jnp.uint32, sharding=wider["step"].sharding)},
        )


def test_adapt_receives_the_stored_array_and_its_result_is_placed(tmp_path: Path) -> None:
    """Two more expert slots than were stored: `adapt` appends them."""
    checkpoints = saved(tmp_path, 1)
    state = make_state(mesh(2, 4), 1)
    target = target_of(state, mesh(1, 2))
    sharding = NamedSharding(mesh(1, 2), PartitionSpec("expert"))
    target["params"]["blocks"][0]["gate_up"] = jax.ShapeDtypeStruct(
        (10, 8, 4), jnp.float32, sharding=sharding
    )
    seen = []

    def adapt(path: str, array: jax.Array) -> jax.Array:
        seen.append((path, array.shape, array.sharding.is_fully_replicated))
        return jnp.concatenate([array, array[:2]])

    found = checkpoints.restore(1, target, Adapt(lambda path: False, adapt))["params"]["blocks"][0][
        "gate_up"
    ]
    assert seen == [("params/blocks/0/gate_up", (8, 8, 4), True)]
    assert found.sharding == sharding
    expected = np.asarray(state["params"]["blocks"][0]["gate_up"])
    np.testing.assert_array_equal(np.asarray(found), np.concatenate([expected, expected[:2]]))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory for each moment, left by a process that was killed then."""
    root = tmp_path_factory.mktemp("killed")
    done = run_module("killed_saves", root, *MOMENTS)
    assert (json.loads(done.stdout), done.stderr) == (dict.fromkeys(MOMENTS, -signal.SIGKILL), "")
    return root


@pytest.mark.parametrize("moment", MOMENTS)
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
def no_renamed_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a bucket that gcsfuse shows."""
    rename = os.rename

    def refuse(old: str | Path, new: str | Path) -> None:
        if os.path.isdir(old):
            raise OSError(errno.EMFILE, "Too many open files", str(old))
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.usefixtures("no_renamed_folders")
def test_where_folders_cannot_be_renamed_a_marker_commits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "checkpoints"
    checkpoints = saved(directory, 1, 2, 3, keep_last=2)
    assert (checkpoints.steps(), checkpoints.partial_steps()) == ([2, 3], [])
    kept = {f"step_0000000{step}.{kind}" for step in (2, 3) for kind in ("partial", "committed")}
    assert names(directory) == kept
    assert capsys.readouterr().err == (
        f"{directory}: the file system does not rename folders, so a checkpoint counts by a file "
        f"step_N.committed beside its folder step_N.partial: keep both.\n"
    )
    target = target_of(make_state(mesh(2, 4)), mesh(2, 4))
    found = Checkpoints(directory, 2, 0).restore_latest(target)
    assert (found.step, found.meta) == (3, {"step": 3})
    assert_same(found.state, make_state(mesh(2, 4), 3))
    # A run that went back, and the same step once more; a save that was killed does not count.
    (directory / "step_00000009.partial").mkdir()
    assert (checkpoints.steps(), checkpoints.partial_steps()) == ([2, 3], [9])
    checkpoints.save(2, make_state(mesh(2, 4), 99), {"again": True}, wait=True)
    assert names(directory) == {"step_00000002.partial", "step_00000002.committed"}
    assert_same(checkpoints.restore(2, target), make_state(mesh(2, 4), 99))


@pytest.mark.usefixtures("no_renamed_folders")
def test_a_marker_commits_over_a_checkpoint_that_was_copied_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setattr(os, "rename", os.replace)
        saved(tmp_path, 1, 2)
    assert names(tmp_path) == {"step_00000001", "step_00000002"}
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=0)
    checkpoints.save(2, make_state(mesh(2, 4), 99), {}, wait=True)
    assert names(tmp_path) == {"step_00000002.partial", "step_00000002.committed"}
    target = target_of(make_state(mesh(2, 4)), mesh(2, 4))
    assert_same(checkpoints.restore(2, target), make_state(mesh(2, 4), 99))


@pytest.mark.usefixtures("no_renamed_folders")
def test_a_marker_that_cannot_be_written_leaves_the_step_uncounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, write = saved(tmp_path, 1), integrity.write_durably

    def fail(path: Path, text: str) -> None:
        if path.suffix == ".committed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        write(path, text)

    monkeypatch.setattr(integrity, "write_durably", fail)
    with pytest.raises(UserError, match=r"step 2 cannot be saved in .*Permission denied"):
        checkpoints.save(2, make_state(mesh(2, 4), 2), {}, wait=True)
    assert (checkpoints.steps(), checkpoints.partial_steps()) == ([1], [])


def test_what_a_desktop_leaves_in_a_checkpoint_is_no_damage(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    for folder in (tmp_path, step_path(tmp_path, 1), step_path(tmp_path, 1) / "state"):
        (folder / ".DS_Store").write_bytes(b"\0")
    state = make_state(mesh(2, 4), 1)
    assert_same(checkpoints.restore(1, target_of(state, mesh(2, 4))), state)


def test_an_opened_directory_is_left_alone_while_another_saves(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step_00000002.partial").mkdir()
    reader = Checkpoints(tmp_path, 1, 0)
    reader.restore(1, target_of(make_state(mesh(2, 4)), mesh(2, 4)))
    assert (reader.steps(), reader.partial_steps()) == ([1], [2])


def test_a_step_pruned_while_it_is_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1)
    match = orbax_io.match

    def prune_then_match(path: Path, *rest: object) -> None:
        shutil.rmtree(path)
        match(path, *rest)

    monkeypatch.setattr(orbax_io, "match", prune_then_match)
    with pytest.raises(UserError, match="has just removed step 1"):
        checkpoints.restore(1, target_of(make_state(mesh(2, 4)), mesh(2, 4)))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


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


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_an_error_in_the_background_surfaces_on_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoints = saved(tmp_path, 1)
    state = make_state(mesh(2, 4))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("moe_jax.checkpoint.integrity.seal_directory", fail)
        checkpoints.save(2, state, {})
        with pytest.raises(UserError, match="too full to save step 2"):
            getattr(checkpoints, call)(*((3, state, {}) if call == "save" else ()))
    assert checkpoints.steps() == [1]
    checkpoints.close()  # Raised once, not again.


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"step 1 cannot be saved in .*file"):
        Checkpoints(tmp_path / "file" / "checkpoints", 1, 0).save(1, make_state(mesh(2, 4)), {})


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


def test_states_that_cannot_be_named_or_stored_are_refused(tmp_path: Path) -> None:
    one = jax.device_put(np.ones(2, np.float32), NamedSharding(mesh(2, 4), PartitionSpec()))
    checkpoints = Checkpoints(tmp_path, 1, 0)
    with pytest.raises(ValueError, match="same path"):
        checkpoints.save(1, {"a/b": one, "a": {"b": one}}, {})
    with pytest.raises(TypeError, match="lr of the state is float"):
        checkpoints.save(1, {"lr": 1.0, "w": one}, {})
    assert list(tmp_path.iterdir()) == []
