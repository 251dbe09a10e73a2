"""Checkpoints: what is saved comes back on any mesh, what is damaged is refused, what is
half-written does not count.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.checkpoint import integrity, orbax_io
from moe_jax.checkpoint.manager import Checkpoints, SlotSources
from moe_jax.errors import CorruptCheckpoint, UserError
from tests.support.restoring_process import bytes_read
from tests.support.saved_state import assert_same, make_state, mesh, saved, step_path, target_of


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


def test_values_are_verified_even_if_the_files_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault between the disk and the devices: what was read is not what the manifest says of the
    array.
    """
    checkpoints = saved(tmp_path, 1)
    state = make_state(mesh(2, 4), 1)
    real = {"read": orbax_io.read, "read_slots": orbax_io.read_slots}

    def make_faulty(reader: str, name: str, place: tuple[int, ...]) -> None:
        def faulty(*arguments):
            arrays = real[reader](*arguments)
            arrays[name] = arrays[name].at[place].add(1e-3)
            return arrays

        monkeypatch.setattr(orbax_io, reader, faulty)

    target = target_of(state, mesh(2, 4))
    make_faulty("read", "params/embed", (3, 3))
    with pytest.raises(CorruptCheckpoint, match="array params/embed"):
        checkpoints.restore(1, target)
    monkeypatch.undo()
    make_faulty("read_slots", f"opt_state/0/mu/{EXPERTS}", (1, 7, 3, 3))
    with pytest.raises(CorruptCheckpoint, match=f"array opt_state/0/mu/{EXPERTS}"):
        checkpoints.restore(1, target, sources(np.tile(np.arange(8)[::-1], (2, 1))))


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


EXPERTS = "stacks/0/blocks/0/mlp/experts/gate_up"
# Which stored slot is in each of ten, for two layers: some twice, one nowhere, two empty.
OTHER_SLOTS = np.array([[7, 0, 1, 2, 3, -1, 5, 6, 0, -1], [0, 0, -1, 6, 5, 4, 3, 2, 1, 7]])


def sources(rows: np.ndarray) -> SlotSources:
    return lambda path: rows if path.endswith(EXPERTS) else None


def with_other_slots(state):
    """The same with the slots of OTHER_SLOTS, moments too."""

    def change(path, array: np.ndarray) -> np.ndarray:
        if "experts" not in jax.tree_util.keystr(path):
            return np.asarray(array)
        laid = np.take_along_axis(np.asarray(array), OTHER_SLOTS[..., None, None], axis=1)
        return np.where(OTHER_SLOTS[..., None, None] < 0, 0, laid)

    return jax.tree.map_with_path(change, state)


def target_with_other_slots(state, onto):
    target = target_of(state, onto)
    changed = with_other_slots(state)
    return jax.tree.map(
        lambda leaf, array: jax.ShapeDtypeStruct(array.shape, leaf.dtype, sharding=leaf.sharding),
        target,
        changed,
    )


@pytest.mark.parametrize("saved_by", ["this version", "one without checksums of slots"])
@pytest.mark.parametrize(("data", "expert"), [(4, 2), (1, 1), (1, 5)])
def test_experts_are_laid_out_in_other_slots(
    tmp_path: Path, data: int, expert: int, saved_by: str
) -> None:
    checkpoints = saved(tmp_path, 1)
    if saved_by != "this version":
        manifest = integrity.read_manifest(step_path(tmp_path, 1))
        for entry in manifest["arrays"].values():
            entry.pop("slots", None)
        for name in (integrity.MANIFEST, integrity.SEAL):
            (step_path(tmp_path, 1) / name).unlink()
        integrity.seal_directory(step_path(tmp_path, 1), manifest)
    state = make_state(mesh(2, 4), 1)
    target = target_with_other_slots(state, mesh(data, expert))
    found = checkpoints.restore(1, target, sources(OTHER_SLOTS))
    assert_same(found, with_other_slots(state))
    assert jax.tree.all(jax.tree.map(lambda x, t: x.sharding == t.sharding, found, target))
    with pytest.raises(UserError, match=r"gate_up .* has shape \(2, 8, 8, 4\) where"):
        checkpoints.restore(1, target)


def test_only_the_slots_that_devices_hold_are_read(tmp_path: Path) -> None:
    """Each once, whatever devices share it; counted in bytes."""
    sharding = NamedSharding(mesh(2, 4), PartitionSpec(None, "expert", "data"))
    bits = np.random.default_rng(0).integers(0, 2**32, (2, 8, 64, 256), np.uint32)
    checkpoints = Checkpoints(tmp_path, 1, 0)
    checkpoints.save(1, {EXPERTS: jax.device_put(bits, sharding)}, {}, wait=True)
    rows = np.array([[5, 0, 5, -1], [1, 1, 2, 5]])
    leaf = jax.ShapeDtypeStruct((2, 4, 64, 256), np.uint32, sharding=sharding)
    path, before = step_path(tmp_path, 1) / "state", bytes_read()
    found = orbax_io.read_slots(path, {EXPERTS: leaf}, {EXPERTS: rows})[EXPERTS]
    read, slot = bytes_read() - before, bits[0, 0].nbytes
    assert 5 * slot <= read < 5.1 * slot
    expected = np.take_along_axis(bits, rows[..., None, None], axis=1)
    np.testing.assert_array_equal(found, np.where(rows[..., None, None] < 0, 0, expected))


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


def test_states_that_cannot_be_named_or_stored_are_refused(tmp_path: Path) -> None:
    one = jax.device_put(np.ones(2, np.float32), NamedSharding(mesh(2, 4), PartitionSpec()))
    checkpoints = Checkpoints(tmp_path, 1, 0)
    with pytest.raises(ValueError, match="same path"):
        checkpoints.save(1, {"a/b": one, "a": {"b": one}}, {})
    with pytest.raises(TypeError, match="lr of the state is float"):
        checkpoints.save(1, {"lr": 1.0, "w": one}, {})
    assert list(tmp_path.iterdir()) == []
