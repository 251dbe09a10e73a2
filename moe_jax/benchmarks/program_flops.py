"""The collectives' bytes that a training step cannot do without, and the FLOPs that its compiled
program spends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.schema import OptimizerConfig
from moe_jax.models.batch import Batch
from moe_jax.models.head import collective_values
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.paths import path_of
from moe_jax.moe.dispatch import pool_capacity
from moe_jax.ops.grouped_matmul.tiled import TILE, TILE_GRAD, tiled
from moe_jax.parallel.sharding import GATHERED
from moe_jax.profiling import hlo
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram


class LeastBytes(NamedTuple):
    """Bytes per device of the collectives that a training step cannot do without, counted as
    `hlo.Collective.bytes` is.
    """

    pools: int  # all-to-alls of the MoE layers
    lookup: int  # all-to-alls of the embedding and of the head
    all_gather: int
    reduce_scatter: int


def least_bytes(program: TrainProgram, batch: int, seq_len: int) -> LeastBytes:
    """The floor of a training step of `batch` sequences over all devices.

    pools: those of a layer are R*C rows of D values of the compute type. They travel there and
    back, forward and backward, so 4 times (6 with rematerialisation, which sends the forward pools
    again); 4 bytes per row beside them carry slots, once (twice). Nothing travels where a device
    has all experts, or gathers tokens. With `dropless` this is the first round alone. lookup: T
    rows of D values swap tokens for widths, and back in the backward pass; so do the shards of a
    head that is split for the loss (models/head.py), which then gathers tokens and its columns
    alone.

    all_gather, reduce_scatter: each FSDP-sharded parameter is gathered once, in the type it is
    computed in, and its gradient scattered once, which is the size of the parameter less its
    `tensor` shards. Gathering again for the backward pass doubles the gathers and is the price of
    keeping no gathered parameter.

    Each accumulation part does all this again. All-reduces (statistics, norms) are left out: they
    are small.
    """
    model, moe, sizes, parts = (
        program.model,
        program.moe,
        dict(program.mesh.shape),
        program.accumulation,
    )
    ranks, itemsize = sizes["expert"], jnp.dtype(model.compute_dtype).itemsize
    tokens = batch * seq_len // (sizes["data"] * ranks * parts)
    capacity = pool_capacity(tokens, moe.top_k, ranks, moe.capacity_factor)
    pooled = (
        ranks > 1
        and moe.dispatch != "gather"
        and not (moe.dispatch == "auto" and tokens < moe.gather_below)
    )
    times = 1 if model.remat == "none" else 2
    pools = ranks * capacity * ((2 + 2 * times) * model.width * itemsize + times * 4) * pooled
    fsdp, lookup = 0, 2 * tokens * model.width * itemsize * (sizes["data"] * ranks > 1)
    head = "embedding" if model.tied_embeddings else "head"

    def is_axes(value: Any) -> bool:
        return isinstance(value, tuple)

    paths = jax.tree.leaves_with_path(program.param_axes, is_leaf=is_axes)
    for (keys, axes), parameter in zip(
        paths, jax.tree.leaves(program.abstract_state.params), strict=True
    ):
        text = path_of(keys).text
        if text == "embedding" != head:
            continue  # looked up, never gathered
        over = {"width": sizes["data"] * ranks, "slot_width": sizes["data"]}
        if all(over[name] == 1 for name in axes if name in GATHERED):
            continue
        shards = (
            sizes["tensor"] if {"heads", "kv_heads", "hidden", "vocab"} & set(axes) else 1
        ) * (ranks if "slots" in axes else 1)
        f32 = path_of(keys).is_router  # computed in it
        if text == head:
            columns = parameter.size // model.width // shards
            gathered, swapped = collective_values(model.width, columns, tokens, sizes)
            fsdp, lookup = fsdp + gathered * itemsize, lookup + 2 * swapped * itemsize
            continue
        fsdp += parameter.size // shards * (4 if f32 else itemsize)
    return LeastBytes(
        pools * count_moe_layers(model, moe) * parts, lookup * parts, fsdp * parts, fsdp * parts
    )


class ProgramFlops(NamedTuple):
    """FLOPs of all matmuls in one run of a program, over all devices."""

    counted: int  # outside the experts' loops: exact from the program's text
    experts: int  # in the experts' loops, for the rows that they hold
    padding: int  # in the same loops, for the rest of each group's last tile

    @property
    def total(self) -> int:
        """Everything, padding included."""
        return sum(self)


def program_flops(
    text: str, devices: int, width: int, hidden: int, group_sizes: Sequence[int]
) -> ProgramFlops:
    """FLOPs that a compiled step runs, matmul by matmul, from its HLO and the rows that its experts
    got.

    The text gives every matmul and how often counted loops repeat it. The `tiled` grouped matmul
    walks each group in tiles in a loop whose length only the run knows: a matmul that joins a tile
    of rows (TILE or TILE_GRAD) with a [width, hidden] or [width, 2*hidden] matrix runs ceil(n /
    tile) times for a group of n rows. `group_sizes` are the rows of every group over devices and
    layers (`group_sizes` below records them). Each place in the program where experts are computed
    is counted, so experts computed twice show as such. `hidden` is that of a `tensor` shard. Later
    dropless rounds (loops within loops) are not counted: use it on a step of one round. Other back
    ends' grouped matmuls are whole in `counted` (`reference`) or absent (`ragged`: see
    `hlo.uncounted`).
    """
    sizes = np.asarray(group_sizes, np.int64)
    counted = experts_flops = all_flops = 0.0
    for dot in hlo.dots(text):
        tile = _tile(dot.dims, width, hidden)
        if dot.unknown == 0:
            counted += dot.flops * dot.runs * devices
        elif dot.unknown == 1 and tile:
            groups = (
                dot.runs * devices
            )  # as many as len(sizes), except for layers that are not stacked together
            experts_flops += dot.flops / tile * groups * float(sizes.mean())
            all_flops += dot.flops * groups * float(np.mean(-(-sizes // tile)))
    return ProgramFlops(int(counted), round(experts_flops), round(all_flops - experts_flops))


def _tile(dims: tuple[int, ...], width: int, hidden: int) -> int | None:
    """Rows of an expert matmul's tile: the dimension beside those of its weights, or None for
    another matmul.
    """
    weights = (sorted((width, 2 * hidden)), sorted((width, hidden)))
    for tile in (TILE, TILE_GRAD):
        rest = sorted(dims)
        if tile in rest:
            rest.remove(tile)
            if rest in weights:
                return tile
    return None


def group_sizes(program: TrainProgram, state: TrainState, batch: Batch) -> list[int]:
    """Rows of each group of the experts' matmuls in a forward pass, over devices and layers, in no
    order.

    It runs the model once with a back end of its own that reports what it is given (twice per
    layer, which changes no mean). Expert dropout and input noise are off, so it holds for a
    training step without them.
    """
    sizes: list[int] = []

    def reporting(
        x_ND: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array, transposed: bool
    ) -> jax.Array:
        jax.debug.callback(lambda rows: sizes.extend(np.asarray(rows).ravel().tolist()), sizes_G)
        return tiled(x_ND, w_GDF, sizes_G, transposed)

    back_end: dict[str, Any] = {"grouped_matmul": reporting}  # which no configuration can name
    reported = TrainProgram(
        program.model,
        dataclasses.replace(program.moe, **back_end),
        OptimizerConfig(),
        program.mesh,
        program.placement,
        vocab_size=program.vocab_size,
        steps=1,
        hosts=program.hosts,
    )
    jax.block_until_ready(reported.eval_step(state.params, state.tables, batch))
    jax.effects_barrier()
    return sizes
