"""The weights of a model on disk, whatever form they have there, as training parameters with
experts in logical order.

    weights = source.find(Path("runs/first")).weights()
    index = (slice(0, 1), np.array([3, 7]), slice(None), slice(None))
    part = weights.leaf("stacks/0/blocks/0/mlp/experts/down", index)

Exporting, and training that starts from another model, read through this. A Hugging Face folder is
read by byte ranges; a run's checkpoint and a packed folder are restored whole, once, into the
host's memory, where parts of parameters are then only looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import hf
from moe_jax.checkpoint import expert_layout
from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.model_io.describe import Description
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.parameters import Parameter, parameters
from moe_jax.models.paths import ParameterPath
from moe_jax.models.weight_layout import plan_weight
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous
from moe_jax.runtime.platform import host_device

Index = tuple[Any, ...]
Read = Callable[[str, Index | None], np.ndarray]


class Weights(NamedTuple):
    """Where the parameters of a model come from."""

    leaf: Read
    """Part of a parameter by its path: a slice for each dim, or ids in place of the experts' (-1
    gives zeros); None is all of it.
    """
    bias_LE: np.ndarray | None
    """The routers' selection bias, f32; None where the model has none."""


def hugging_face_weights(path: Path) -> Weights:
    """Of a Hugging Face folder; only headers and the selection bias are read yet."""
    checkpoint = hf.open_checkpoint(path)
    return Weights(checkpoint.leaf, checkpoint.bias_LE())


def run_weights(
    path: Path, described: Description, step: int | None = None, fallback: bool = False
) -> Weights:
    """Of a run's checkpoint. Raises UserError where there is none."""
    checkpoints = Checkpoints(path / "checkpoints", 1, 0)
    expert_layout.saved_placement(checkpoints, step, fallback)  # refuses a run without any
    on_host = _on_host()
    placement = contiguous(_moe_layers(described), described.moe.num_experts, 1)
    restored = checkpoints.restore_latest(
        {
            "params": {
                name: on_host(parameter.stacked_shape, jnp.float32)
                for name, parameter in _parameters(described).items()
            },
            "tables": {"bias_E": _bias(described, on_host)},
        },
        expert_layout.sources_for(described.model, described.moe, placement),
        step=step,
        fallback=fallback,
        subset=True,
    )
    arrays = {name: np.asarray(array) for name, array in restored.state["params"].items()}
    return Weights(_lookup(arrays), np.asarray(restored.state["tables"]["bias_E"]))


def packed_weights(path: Path, described: Description) -> Weights:
    """Of a packed folder. Raises UserError where its weights are quantised."""
    if described.quantization != "float":
        raise UserError(
            f"{path} was converted to {described.quantization}, which loses what its weights "
            f"were: name what it was made from."
        )
    on_host, dtype = _on_host(), jnp.dtype(described.dtype)
    plans = {
        name: plan_weight(
            name, parameter.stacked_shape, parameter.axes, PartitionSpec(), dtype=dtype
        )
        for name, parameter in _parameters(described).items()
    }
    target = {
        "params": {
            name: jax.tree.map(lambda a: on_host(a.shape, a.dtype), plan.abstract())
            for name, plan in plans.items()
        },
        "bias": _bias(described, on_host),
    }
    state = Checkpoints(path / "weights", 1, 0).restore(0, target)
    arrays = {}
    for name, held in state["params"].items():
        plan = plans[name]
        arrays[name] = plan.unpack(np.asarray(held if plan.order is None else held.values))
    return Weights(_lookup(arrays), np.asarray(state["bias"]))


def _parameters(described: Description) -> dict[str, Parameter]:
    return dict(parameters(described.model, described.moe, described.vocab_size))


def _moe_layers(described: Description) -> int:
    return count_moe_layers(described.model, described.moe)


def _on_host() -> Callable[[tuple[int, ...], Any], jax.ShapeDtypeStruct]:
    """Makes targets of a restore that lie on one CPU device."""
    mesh = make_mesh(MeshConfig(), [host_device()])
    whole = NamedSharding(mesh, PartitionSpec())
    return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)


def _bias(described: Description, on_host: Any) -> jax.ShapeDtypeStruct:
    return on_host((_moe_layers(described), described.moe.num_experts), jnp.float32)


def _lookup(arrays: dict[str, np.ndarray]) -> Read:
    """Reads parts of arrays in memory, experts by their ids."""

    def leaf(path: str, index: Index | None = None) -> np.ndarray:
        array = arrays[path]
        if index is None:
            return array
        if not ParameterPath.parse(path).is_expert or isinstance(index[1], slice):
            return array[index]
        repeats, ids, *rest = index
        part = array[(repeats, np.maximum(ids, 0), *rest)]
        part[:, ids < 0] = 0
        return part

    return leaf
