"""A model saved as it is held for inference: our own sharded form, which a restart reads without
permuting or quantising.

OUT/moe_jax.json describes the model; OUT/weights is one sealed checkpoint (checkpoint/), experts in
logical order; OUT/tokenizer holds the tokenizer's files. It restores on any mesh.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moe_jax.checkpoint import expert_layout
from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.data.tokenizer_files import copy_tokenizer
from moe_jax.errors import UserError
from moe_jax.model_io.packed_header import KEPT_CONFIG, PACKED_HEADER, PackedHeader
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.paths import ParameterPath, nested
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.models.weight_layout import WeightPlan
from moe_jax.parallel.sharding import named
from moe_jax.placement.table import contiguous
from moe_jax.runtime.platform import host_device
from moe_jax.utils.files import new_folder
from moe_jax.utils.units import gibibytes


def write_packed(
    out: Path,
    plan: ServingPlan,
    params: Any,
    bias_LE: jax.Array,
    header: PackedHeader,
    tokenizer: str,
    hf_config: dict[str, Any] | None = None,
) -> None:
    """Saves weights as they are held; `tokenizer` is "bytes" or a path, `hf_config` the config.json
    that an export should have.

    Nothing is left of a write that fails. Raises UserError where OUT exists, or its disk has no
    room.
    """
    layers, experts = count_moe_layers(plan.model, plan.moe), plan.moe.num_experts
    logical = contiguous(layers, experts, 1).physical_to_logical
    if not np.array_equal(plan.placement.physical_to_logical, logical):
        raise ValueError("experts must lie in logical order: open the model on one device")
    with new_folder(out) as part:
        _check_room(out, part, params)
        state, meta = {"params": params, "bias": bias_LE}, {"placement": plan.placement.to_json()}
        Checkpoints(part / "weights", 1, 0).save(0, state, meta, wait=True)
        if tokenizer != "bytes":
            copy_tokenizer(tokenizer, part / "tokenizer")
        if hf_config is not None:
            text = json.dumps(hf_config, indent=2) + "\n"
            (part / KEPT_CONFIG).write_text(text, encoding="utf-8")
        values = header._asdict() | {
            "model": dataclasses.asdict(header.model),
            "moe": dataclasses.asdict(header.moe),
        }
        (part / PACKED_HEADER).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _check_room(out: Path, part: Path, params: Any) -> None:
    """Refuses to begin what the disk cannot hold."""
    needed, free = (
        sum(array.nbytes for array in jax.tree.leaves(params)),
        shutil.disk_usage(part).free,
    )
    if needed > free:
        raise UserError(
            f"{out} needs {gibibytes(needed)} and its disk has {gibibytes(free)} left: free some "
            f"space, or name another disk."
        )


def restore_packed(
    path: Path, plan: ServingPlan, *, experts_on_host: bool = False
) -> tuple[Any, jax.Array]:
    """Weights in the plan's slots, and the selection bias [L, E]. Raises CorruptCheckpoint where
    bytes are damaged.

    On one device experts can be left in the host's memory, for `offload`.
    """

    def planned(name: str, leaf: WeightPlan) -> Any:
        shapes, shardings = leaf.abstract(), named(plan.mesh, leaf.held_spec())
        if experts_on_host and ParameterPath.parse(name).is_expert:
            host = SingleDeviceSharding(host_device())
            shardings = jax.tree.map(lambda _: host, shapes)
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
        )

    params = nested({name: planned(name, leaf) for name, leaf in plan.weights.items()})
    layers, experts = count_moe_layers(plan.model, plan.moe), plan.moe.num_experts
    bias = jax.ShapeDtypeStruct(
        (layers, experts), jnp.float32, sharding=NamedSharding(plan.mesh, P())
    )
    sources = expert_layout.between(
        plan.model, plan.moe, contiguous(layers, experts, 1), plan.placement
    )
    state = Checkpoints(path / "weights", 1, 0).restore(
        0, {"params": params, "bias": bias}, sources
    )
    return state["params"], state["bias"]
