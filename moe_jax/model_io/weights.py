"""The weights of a model on disk, whatever form they have there, as training parameters with
experts in logical order.

weights = open_weights(Path("runs/first"))
index = (slice(0, 1), np.array([3, 7]), slice(None), slice(None))
part = weights.leaf("stacks/0/blocks/0/mlp/experts/down", index)

Exporting, and training that starts from another model, read through this. A Hugging Face folder is
read by byte ranges; a run's checkpoint and a converted folder are restored whole, once, into the
host's memory, which leaves then only look into.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import hf
from moe_jax.checkpoint import expert_layout
from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.inference import packed_checkpoint, restore
from moe_jax.model_io.describe import CONVERTED, RUN, Description
from moe_jax.models.layer_pattern import count_moe_layers, expert_layers
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import Placement, contiguous
from moe_jax.tracking.run_dir import read_run_config

Index = tuple[Any, ...]
Read = Callable[[str, Index | None], np.ndarray]


class Weights(NamedTuple):
    """Where the parameters of a model come from."""

    leaf: Read
    """Part of a leaf by its path: a slice for each dim, or ids in place of the experts' (-1 gives
    zeros); None is all of it.
    """
    bias_LE: np.ndarray | None
    """The routers' selection bias, f32; None where the model has none."""


def open_weights(
    path: Path, described: Description, *, step: int | None = None, fallback: bool = False
) -> Weights:
    """The weights of a folder that `describe` has read. Raises UserError where there are none, or
    they are quantised.

    `step` and `fallback` choose a run's checkpoint, as in `Checkpoints.restore_latest`.
    """
    if described.source == RUN:
        return _of_run(path, described, step, fallback)
    if described.source == CONVERTED:
        return _of_converted(path, described)
    if path.is_file():
        raise UserError(
            f"{path} is a configuration, which has no weights: name a run directory or a folder "
            f"with a checkpoint."
        )
    checkpoint = hf.open_checkpoint(path)
    return Weights(checkpoint.leaf, checkpoint.bias_LE())


def _engine(described: Description, placement: Placement, dtype: str) -> ServingPlan:
    """The plan of the parameters on the host alone."""
    host = make_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])
    return ServingPlan(
        described.model,
        described.moe,
        host,
        placement,
        vocab_size=described.vocab_size,
        dtype=dtype,
    )


def _of_run(path: Path, described: Description, step: int | None, fallback: bool) -> Weights:
    config = read_run_config(path)
    checkpoints = Checkpoints(
        path / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best
    )
    saved = expert_layout.saved_placement(checkpoints, step, fallback)
    if saved is None:
        wanted = "" if step is None else f" of step {step} or before"
        raise UserError(
            f"{path / 'checkpoints'} holds no checkpoint{wanted}: train first, or name another "
            f"run directory."
        )
    engine = _engine(described, restore.serving_placement(saved, 1), "float32")
    tree, bias_LE = restore.restore_model(checkpoints, engine, step=step, fallback=fallback)
    arrays = {
        name: np.asarray(value)
        for name, value in zip(engine.weights, _flat(engine, tree), strict=True)
    }
    return Weights(_by_expert(engine, arrays), np.asarray(bias_LE))


def _of_converted(path: Path, described: Description) -> Weights:
    if described.quantization != "float":
        raise UserError(
            f"{path} was converted to {described.quantization}, which loses what its weights "
            f"were: name what it was made from."
        )
    layers = count_moe_layers(described.model, described.moe)
    engine = _engine(described, contiguous(layers, described.moe.num_experts, 1), described.dtype)
    tree, bias_LE = packed_checkpoint.restore_packed(path, engine)
    arrays = {}
    for (name, leaf), value in zip(engine.weights.items(), _flat(engine, tree), strict=True):
        array = np.asarray(value if leaf.order is None else value.values)
        arrays[name] = (
            array
            if leaf.order is None
            else array.reshape(leaf.ordered).transpose(np.argsort(leaf.order))
        )
    return Weights(_by_expert(engine, arrays), np.asarray(bias_LE))


def _flat(engine: ServingPlan, tree: Any) -> list[Any]:
    """The leaves of a tree in the order of `engine.weights`."""
    found = []
    for path in engine.weights:
        node = tree
        for key in path.split("/"):
            node = node[int(key) if key.isdigit() else key]
        found.append(node)
    return found


def _by_expert(engine: ServingPlan, arrays: dict[str, np.ndarray]) -> Read:
    """Reads arrays whose experts lie in the engine's slots by expert."""
    slots_LE = engine.placement.first_slot()
    layers = expert_layers(engine.model, engine.moe)

    def leaf(path: str, index: Index | None = None) -> np.ndarray:
        array = arrays[path]
        index = index or (slice(None),) * array.ndim
        if "/experts/" not in path:
            return array[index]
        _, stack, _, block, *_ = path.split("/")
        ids = (
            np.arange(engine.moe.num_experts)[index[1]] if isinstance(index[1], slice) else index[1]
        )
        found = []
        for repeat in range(array.shape[0])[index[0]]:
            slots = slots_LE[layers[int(stack), int(block)][repeat]]
            rows = array[repeat][(slots[np.maximum(ids, 0)], *index[2:])]
            rows[ids < 0] = 0
            found.append(rows)
        return np.stack(found)

    return leaf
