"""A forecaster's weights on the devices of a mesh, and its methods as compiled programs.

    placed = place(open_chronos(folder), mesh)
    quantiles = placed.run(ChronosBolt.__call__, contexts)      # numpy in and out, a row a series

Rows are split over `data` and `expert`, and every device computes with its own; there may be any
number of them. Weights are split as `parallel/sharding.py` says, read by the byte ranges of each
device's part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.models.chronos.config import ChronosConfig
from moe_jax.parallel.collectives import BATCH_AXES
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.sharding import GATHERED, RULES, Rules, apply_rules, named, specs


class Placeable(Protocol):
    """A model on disk: its `abstract` module, and its parameters by path and parts."""

    @property
    def folder(self) -> Path:
        """Where it is, for messages."""

    @property
    def config(self) -> ChronosConfig:
        """What makes it up."""

    @property
    def abstract(self) -> nnx.Module:
        """The module, without values."""

    def leaf(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a parameter, f32."""


def fitting_rules(model: nnx.Module, mesh: Mesh, fsdp: bool) -> Rules:
    """The rules for training, without `fsdp` whole widths on every device; those stay out whose
    axes do not divide a dim of the model.
    """
    rules = dict(RULES)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        axes = variable.get_metadata("axes")
        for name, size in zip(axes, variable.get_value().shape[-len(axes) :], strict=True):
            devices = int(np.prod([mesh.shape[axis] for axis in rules[name]]))
            if size % devices or (name in GATHERED and not fsdp):
                rules[name] = ()
    return rules


class PlacedModel:
    """Weights on a mesh; `run` computes with them."""

    def __init__(self, graph: nnx.GraphDef, state: Any, spec: Any, mesh: Mesh):
        self.mesh, self.state, self._graph, self._spec = mesh, state, graph, spec
        self._programs: dict[Any, Any] = {}

    @property
    def row_devices(self) -> int:
        """Parts into which rows are split."""
        return int(np.prod([self.mesh.shape[axis] for axis in BATCH_AXES]))

    def run(self, method: Callable[..., Any], *rows: np.ndarray, **static: Any) -> Any:
        """`method(model, *rows, **static)` in numpy; it takes and gives arrays whose first dim
        counts rows, of which it computes each by itself.
        """
        count = len(rows[0])
        padded = -(-rounded(count) // self.row_devices) * self.row_devices
        repeated = [
            np.concatenate([array, np.repeat(array[:1], padded - count, axis=0)]) for array in rows
        ]
        placed = jax.device_put(repeated, NamedSharding(self.mesh, P(BATCH_AXES)))
        results = self.program(method, **static)(self.state, *placed)
        return jax.tree.map(lambda array: np.asarray(array)[:count], results)

    def program(self, method: Callable[..., Any], **static: Any) -> Any:
        """What `run` compiles, of the state and rows that the devices divide."""
        key = (method, tuple(sorted(static.items())))
        if key not in self._programs:
            self._programs[key] = jax.jit(self._inside(functools.partial(method, **static)))
        return self._programs[key]

    def gradients(self, method: Callable[..., Any], *rows: np.ndarray) -> tuple[Any, Any]:
        """The mean of `method(model, *rows)` [B], and its gradient by every parameter, as a state
        of the model. The devices divide the number of rows.
        """
        mean = jax.jit(jax.value_and_grad(lambda *given: jnp.mean(self._inside(method)(*given))))
        return mean(self.state, *rows)

    def _inside(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """`method` of the model whose state comes first, each device with its rows."""

        def compute(state: Any, *arrays: jax.Array) -> Any:
            rows = P(BATCH_AXES)
            return jax.shard_map(
                lambda state, *arrays: method(nnx.merge(self._graph, state), *arrays),
                mesh=self.mesh,
                in_specs=(self._spec, *([rows] * len(arrays))),
                out_specs=rows,
            )(state, *arrays)

        return compute


def place(checkpoint: Placeable, mesh: Mesh | None = None, *, fsdp: bool = False) -> PlacedModel:
    """Reads a checkpoint onto a mesh, by default of one device; each device its part: with `fsdp`
    as in training, else all that `tensor` does not split.
    """
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    model, config = checkpoint.abstract, checkpoint.config
    rules = fitting_rules(model, mesh, fsdp)
    if config.vocab_size > 2 and not rules["vocab"]:
        raise UserError(
            f"{checkpoint.folder}: its {config.vocab_size} tokens cannot be split over "
            f"mesh.tensor={mesh.shape['tensor']}: choose a divisor of them."
        )
    apply_rules(model, rules)
    graph, state = nnx.split(model)
    spec = specs(state)
    shardings = traverse_util.flatten_dict(named(mesh, nnx.to_pure_dict(spec)))
    arrays = {}
    for keys, variable in nnx.to_flat_state(state):
        path = "/".join(map(str, keys))
        arrays[keys] = jax.make_array_from_callback(
            variable.get_value().shape,
            shardings[keys],
            functools.partial(checkpoint.leaf, path),
        )
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(arrays))
    return PlacedModel(graph, state, spec, mesh)


def rounded(count: int) -> int:
    """The least number that is at least `count` and one of few, so that few programs are compiled:
    of four in each octave.
    """
    step = max(1, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step
