"""Moving the experts of a model that is served, as they are held: packed, in bits, split over
`expert` and `tensor`. The program is that with which training moves them (moe/expert_moves.py).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.models.layer_pattern import expert_layers
from moe_jax.models.paths import ParameterPath, by_path, path_of
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.moe.expert_moves import ExpertBank, ExpertMoves, copies_per_call
from moe_jax.moe.tables import LayerTables
from moe_jax.placement.schedule import idle_call, plan_migration
from moe_jax.placement.table import Placement


class ServedExperts:
    """The experts' arrays among an engine's weights, and the program that moves them."""

    def __init__(self, plan: ServingPlan, held: Any):
        """`held` are the weights as programs take them; none of the experts' in several parts
        (`cut_banks`), which are for one device alone.
        """
        assert not any(weight.cuts for weight in plan.weights.values())
        layers, banks, expert_bytes = expert_layers(plan.model, plan.moe), {}, 0
        first = next(iter(layers), None)
        for path, array in by_path(held).items():
            parsed = ParameterPath.parse(path)
            if not parsed.is_expert:
                continue
            banks[path] = ExpertBank(array.sharding.spec, tuple(layers[parsed.layer_block]))
            if parsed.layer_block == first:
                expert_bytes += array.nbytes // (array.shape[0] * array.shape[1])
        self.bytes = expert_bytes
        """Of one expert of one layer, over all devices."""
        share = plan.placement.num_slots // plan.placement.ranks
        self.budget = copies_per_call(share, expert_bytes // plan.mesh.shape["tensor"])
        """Experts that a device copies aside per call."""
        mesh: Any = plan.mesh
        self._paths, self._run = list(banks), ExpertMoves(mesh, banks).run

    def __call__(self, held: Any, old: Placement, new: Placement) -> Any:
        """The weights with experts where the new table says; one call at least, so that the first
        compiles. Waits until they are there.
        """
        arrays = by_path(held)
        banks = {path: arrays[path] for path in self._paths}
        plan = plan_migration(old, new, self.budget)
        for call in plan.calls or [idle_call(old, self.budget)]:
            banks = self._run(banks, call)
        jax.block_until_ready(banks)
        return jax.tree.map_with_path(lambda keys, leaf: banks.get(path_of(keys).text, leaf), held)


def tables_of(mesh: Mesh | AbstractMesh, placement: Placement, bias_E: jax.Array) -> LayerTables:
    """A placement's tables on every device. Nothing is compiled, and processes do not wait for each
    other.
    """
    everywhere: Any = NamedSharding(mesh, P())

    def place(values: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(values.shape, everywhere, lambda index: values[index])

    slots, start, replicas = map(place, placement.routing(1))
    return LayerTables(slots, start, replicas, bias_E)
