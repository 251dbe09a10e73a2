"""A model saved as it is held for inference: our own sharded form, which a restart reads without
permuting or quantising.

OUT/moe_jax.json describes the model; OUT/weights is one sealed checkpoint (checkpoint.py), experts
in logical order; OUT/tokenizer holds the tokenizer's files. It restores on any mesh.
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
from moe_jax.inference.engine import Engine
from moe_jax.inference.session import LoadedModel
from moe_jax.model_io.packed_header import KEPT_CONFIG, PACKED_FORMAT, PACKED_HEADER, PackedHeader
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.weight_layout import WeightPlan
from moe_jax.ops.quantized import Kind
from moe_jax.parallel.sharding import named
from moe_jax.placement.table import contiguous
from moe_jax.utils.units import gibibytes


def write_packed(
    out: Path,
    loaded: LoadedModel,
    tokenizer: str,
    group: int,
    quantization: Kind,
    hf_config: dict[str, Any] | None = None,
) -> None:
    """Saves a loaded model; `tokenizer` is "bytes" or a path, `hf_config` the config.json that an
    export should have.

    Nothing is left of a write that fails. Raises UserError where OUT exists, or its disk has no
    room.
    """
    if out.exists():
        raise UserError(f"{out} exists already: name another folder, or delete it.")
    engine = loaded.engine
    layers, experts = count_moe_layers(engine.model, engine.moe), engine.moe.num_experts
    if not np.array_equal(
        engine.placement.physical_to_logical, contiguous(layers, experts, 1).physical_to_logical
    ):
        raise ValueError("experts must lie in logical order: open the model on one device")
    part = out.with_name(out.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        _check_room(out, part, loaded.params)
        state = {"params": loaded.params, "bias": loaded.tables.bias_E}
        Checkpoints(part / "weights", 1, 0).save(
            0, state, {"placement": engine.placement.to_json()}, wait=True
        )
        if tokenizer != "bytes":
            copy_tokenizer(tokenizer, part / "tokenizer")
        if hf_config is not None:
            (part / KEPT_CONFIG).write_text(
                json.dumps(hf_config, indent=2) + "\n", encoding="utf-8"
            )
        header = PackedHeader(
            PACKED_FORMAT,
            loaded.name,
            engine.model,
            engine.moe,
            engine.vocab_size,
            loaded.context,
            loaded.eos_ids,
            engine.dtype.name,
            quantization,
            group,
            "bytes" if tokenizer == "bytes" else "files",
        )
        values = header._asdict() | {
            "model": dataclasses.asdict(header.model),
            "moe": dataclasses.asdict(header.moe),
        }
        (part / PACKED_HEADER).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


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
    path: Path, engine: Engine, *, experts_on_host: bool = False
) -> tuple[Any, jax.Array]:
    """Weights in the engine's slots, and the selection bias [L, E]. Raises CorruptCheckpoint where
    bytes are damaged.

    On one device experts can be left in the host's memory, for `offload`.
    """

    def target(name: str, leaf: WeightPlan) -> Any:
        shapes, shardings = leaf.abstract(), named(engine.mesh, leaf.held_spec())
        if experts_on_host and "/experts/" in name:
            host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
            shardings = jax.tree.map(lambda _: host, shapes)
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
        )

    params = engine.tree({name: target(name, leaf) for name, leaf in engine.plans.items()})
    layers, experts = count_moe_layers(engine.model, engine.moe), engine.moe.num_experts
    bias = jax.ShapeDtypeStruct(
        (layers, experts), jnp.float32, sharding=NamedSharding(engine.mesh, P())
    )
    adapt = expert_layout.adapter(
        engine.model, engine.moe, contiguous(layers, experts, 1), engine.placement
    )
    state = Checkpoints(path / "weights", 1, 0).restore(0, {"params": params, "bias": bias}, adapt)
    return state["params"], state["bias"]
