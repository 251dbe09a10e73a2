"""Tiny programs and batches for tests of whole training steps."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.config.schema import MeshConfig, OptimizerConfig
from moe_jax.models.layer_pattern import count_moe_layers, expert_layers
from moe_jax.models.paths import path_of
from moe_jax.moe.slots import expert_banks
from moe_jax.moe.tables import make_tables
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import Placement, contiguous, slot_sources
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram

VOCAB, BATCH, LENGTH, EXPERTS, TOP_K = 32, 16, 12, 8, 2
TINY_MODEL: dict[str, Any] = dict(num_layers=2, width=16, num_heads=2, num_kv_heads=2, hidden=16)
TINY_MOE: dict[str, Any] = dict(num_experts=EXPERTS, top_k=TOP_K, hidden=8, dropless=True)


def make_program(
    data: int = 1,
    expert: int = 1,
    tensor: int = 1,
    *,
    moe: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    placement: Placement | None = None,
    redundant: int = 0,
    accumulation: int = 1,
    hosts: int = 1,
) -> TrainProgram:
    model_config = ModelConfig(**TINY_MODEL | (model or {}))
    moe_config = MoEConfig(**TINY_MOE | (moe or {}))
    placement = placement or contiguous(
        count_moe_layers(model_config, moe_config), moe_config.num_experts, expert, redundant
    )
    return TrainProgram(
        model_config,
        moe_config,
        OptimizerConfig(**dict(warmup_steps=0, learning_rate=0.01) | (optimizer or {})),
        make_mesh(MeshConfig(data=data, expert=expert, tensor=tensor)),
        placement,
        vocab_size=VOCAB,
        steps=100,
        accumulation=accumulation,
        hosts=hosts,
    )


def make_batch(seed: int = 0, rows: int = BATCH) -> dict[str, np.ndarray]:
    """Two documents a sequence, then padding of a length that differs between sequences."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, LENGTH + 1)).astype(np.int32)
    place = np.arange(LENGTH)
    ends = rng.integers(LENGTH // 2 + 2, LENGTH + 1, (rows, 1))
    second = place >= LENGTH // 2
    segments = np.where(place < ends, 1 + second, 0).astype(np.int32)
    positions = np.where(second, place - LENGTH // 2, place) * np.ones((rows, 1))
    mask = (segments > 0) & (place != LENGTH // 2 - 1)  # a document's last token has no target
    return dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=positions.astype(np.int32),
        segments=segments,
        mask=mask.astype(np.float32),
    )


def lay_out(params: Any, model: ModelConfig, moe: MoEConfig, placement: Placement) -> Any:
    """A tree of numpy arrays with experts in logical order, changed to slots; zeros where empty."""
    banks: Any = expert_banks(params, expert_layers(model, moe))
    for experts, rows in banks:
        for name, bank in experts.items():
            padded = np.concatenate([bank, np.zeros_like(bank[:, :1])], axis=1)  # -1 is EMPTY
            table = placement.physical_to_logical[rows]
            experts[name] = np.stack([one[row] for one, row in zip(padded, table, strict=True)])
    return params


def moved(program: TrainProgram, state: TrainState, new: Placement) -> TrainState:
    """A state with its experts, and their moments, in the slots of another table."""
    sources = slot_sources(program.placement, new)
    layers = expert_layers(program.model, program.moe)

    def one(keys: Any, a: jax.Array) -> jax.Array:
        path = path_of(keys)
        if not path.is_expert:
            return a
        rows = [sources[layer] for layer in layers[path.layer_block]]
        padded = [np.concatenate([repeat, np.zeros_like(repeat[:1])]) for repeat in np.asarray(a)]
        return jax.device_put(
            np.stack([repeat[row] for repeat, row in zip(padded, rows, strict=True)]), a.sharding
        )

    params, opt_state = (
        jax.tree.map_with_path(one, tree) for tree in (state.params, state.opt_state)
    )
    tables, expert_LP = jax.device_put(make_tables(new), program.state_shardings.expert_LP)
    return state._replace(
        params=params,
        opt_state=opt_state,
        tables=tables._replace(bias_E=state.tables.bias_E),
        expert_LP=expert_LP,
    )
