"""A state as arrays with names: written and read by Orbax, compared with what a model wants.

Everything that knows Orbax and tensorstore is here, their errors included (runtime/quiet.py hides
what they print of them).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.errors import UserError


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by their path, such as "opt_state/0/mu/embed", in tree order."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(flat) != len(pairs):
        raise ValueError(
            "two arrays of the state have the same path: do not use '/' in the keys of its dicts"
        )
    return flat


def start_writing(path: Path, arrays: dict[str, jax.Array]) -> Callable[[], None]:
    """Copy the arrays to the host and begin to write them; the function returned waits and raises
    what went wrong.

    Once this returns the caller may donate the arrays: on CPU, where the copy is a view, JAX then
    leaves the viewed memory alone and gives the donated computation new memory.
    """
    # By default Orbax renames a folder of its own, which some file systems refuse, and which nobody
    # needs here: `path` does not count before it is sealed.
    kind = ocp.path.atomicity.CommitFileTemporaryPath
    checkpointer = ocp.StandardCheckpointer(temporary_path_class=kind)
    checkpointer.save(path, arrays)

    def finish() -> None:
        checkpointer.close()
        if jax.process_index() == 0:
            (path / ocp.path.atomicity.COMMIT_SUCCESS_FILE).unlink()  # it holds the absolute path

    return finish


def read(path: Path, asked: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read some of the arrays written at `path`, onto any mesh; those without elements were not
    stored.
    """
    full = {name: leaf for name, leaf in asked.items() if leaf.size}
    restore_args = ocp.checkpoint_utils.construct_restore_args(full)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(item=full, restore_args=restore_args, partial_restore=True),
        )
    empty = {
        name: jax.numpy.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in asked.items()
        if not leaf.size
    }
    return arrays | empty


def match(
    path: Path, wanted: dict[str, Any], stored: dict[str, Any], adaptable: bool, subset: bool
) -> None:
    """Refuse the checkpoint of another model."""
    other = "it is of another model, use the configuration that it was saved with."
    for name in sorted(wanted.keys() - stored.keys()):
        raise UserError(f"{path} has no array {name}: {other}")
    for name in () if subset else sorted(stored.keys() - wanted.keys()):
        raise UserError(f"{path} has an array {name} that the model does not: {other}")
    for name, leaf in wanted.items():
        shape, dtype = tuple(stored[name]["shape"]), stored[name]["dtype"]
        if dtype != str(leaf.dtype):
            raise UserError(
                f"array {name} of {path} is {dtype} where the model has {leaf.dtype}: {other}"
            )
        if shape != leaf.shape and not adaptable:
            raise UserError(
                f"array {name} of {path} has shape {shape} where the model has {leaf.shape}: "
                f"{other}"
            )


def whole(leaf: jax.ShapeDtypeStruct, shape: list[int]) -> jax.ShapeDtypeStruct:
    """How to read an array that is to be changed: in its stored shape, on every device."""
    return jax.ShapeDtypeStruct(
        shape, leaf.dtype, sharding=NamedSharding(leaf.sharding.mesh, PartitionSpec())
    )


def place(name: str, array: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Give an array that `adapt` made the target's sharding; its shape and dtype must be the
    target's already.
    """
    if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
        raise ValueError(
            f"adapt made {name} {array.shape} {array.dtype}, the target has {leaf.shape} "
            f"{leaf.dtype}"
        )
    return jax.device_put(array, leaf.sharding)


def explain(error: Exception, step: int, directory: Path) -> UserError | None:
    """A failed save in words, where the disk or its permissions are to blame; None for any other
    error.
    """
    quoted = re.search(
        r"os_error_code='(\d+)'", str(error)
    )  # tensorstore's ValueErrors quote the system's errors.
    if not isinstance(error, OSError) and quoted is None:
        return None
    number = error.errno if isinstance(error, OSError) else int(quoted[1]) if quoted else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {directory} is too full to save step {step}: free some space (earlier "
            f"checkpoints are intact)."
        )
    if number == errno.EROFS:
        return UserError(
            f"step {step} cannot be saved in {directory}, whose file system is read-only: name "
            f"another --run-dir (earlier checkpoints are intact)."
        )
    return UserError(
        f"step {step} cannot be saved in {directory} ({error}): see that it is writable (earlier "
        f"checkpoints are intact)."
    )
