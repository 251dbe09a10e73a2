"""The output head in training: the loss of a batch with neither the whole head nor its gradient on
any device.

The head [D, V] is stored in shards of its width over the N devices of the batch's axes. For the
loss, a devices put their tokens together and split the vocabulary: each needs its V / a columns of
the head, and a x T tokens, a chunk at a time. Per device travel, forward and again backward,

    (a - 1) x T x D                        tokens
    D x V / a x (1 - a / N)                columns, gathered from the other N / a devices
    D x V / N x (1 - 1 / a)                shards, of which rows are swapped for columns

values of the compute type. `vocabulary_axes` takes the mesh axes for which this is least. For
Qwen3-30B-A3B (V = 151,936), 4,096 tokens per device and data 4 x expert 16, in units of D values:
149,562 for a = 1 (the whole head is gathered), 49,679 for 4, 70,787 for 16, 260,385 for 64. So the
vocabulary is split over `data`: 203 MB travel and not 613, and a device holds 156 MB of the head
(bf16) and not 622.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.ops.cross_entropy import linear_cross_entropy
from moe_jax.parallel.collectives import BATCH_AXES, all_gather, psum, vary_alike
from moe_jax.parallel.sharding import axes_of, gather
from moe_jax.utils.annotations import Array, Float, Int

# A head of fewer values is gathered: its bytes matter less than one more collective per chunk.
SMALL = 1 << 20


def vocabulary_axes(
    width: int, vocab: int, tokens: int, sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """The batch's mesh axes over which the vocabulary is split, none if all of the head is
    gathered; `vocab` counts the columns that a device stores, `sizes` are those of the mesh axes.
    """
    used = [axis for axis in BATCH_AXES if sizes[axis] > 1]
    if width * vocab < SMALL or not used:
        return ()
    devices = _product(used, sizes)
    choices = [axes for n in range(len(used) + 1) for axes in itertools.combinations(used, n)]

    def rows(axes: tuple[str, ...]) -> float:
        """Rows of D values that reach a device, forward."""
        parts = _product(axes, sizes)
        columns = vocab / parts * (1 - parts / devices)
        return (parts - 1) * tokens + columns + vocab / devices * (1 - 1 / parts)

    return min(choices, key=rows)


def collective_values(
    width: int, vocab: int, tokens: int, sizes: Mapping[str, int]
) -> tuple[int, int]:
    """Values that a device has after the gathers (tokens and columns) and the swap of a loss,
    forward: what the collectives' results hold, its own part included.
    """
    axes = vocabulary_axes(width, vocab, tokens, sizes)
    devices, parts = _product(BATCH_AXES, sizes), _product(axes, sizes)
    columns = width * -(-vocab // parts) * (devices > parts)
    if parts == 1:
        return columns, 0
    return columns + parts * tokens * width, width * -(-vocab // parts) * parts // devices


def _product(axes: Any, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def batch_loss(
    head: nnx.Param,
    hidden_TD: Float[Array, "T D"],
    target_T: Int[Array, " T"],
    weight_T: Float[Array, " T"],
) -> Float[Array, ""]:
    """The weighted sum of the tokens' negative log-likelihoods (nats, f32) over the whole mesh."""
    tokens, width = hidden_TD.shape
    sizes = {axis: lax.axis_size(axis) for axis in BATCH_AXES}
    columns, split = head.get_value().shape[1], axes_of(head, "vocab")
    axes = vocabulary_axes(width, columns, tokens, sizes)
    hidden_TD, shard = _gradients_together(*vary_alike(hidden_TD, head.get_value()))
    tied: Any = head.replace(shard)
    loss = linear_cross_entropy(
        _in_order_of(hidden_TD, axes),
        _block(tied, hidden_TD.dtype, axes),
        target_T,
        weight_T,
        axis=split,
        token_axes=axes,
        columns=columns,
    )
    rest = _others(axes)
    return psum(loss, rest)


@jax.custom_vjp
def _gradients_together(hidden_TD: jax.Array, shard: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as they are; in the backward pass neither gradient goes on before the other is made.

    Nothing but the optimizer uses the head's gradient, so that the TPU compiler put off what makes
    a device's shard of it until all layers were through: the gradient of a device's columns lived
    all that time, in f32.
    """
    return hidden_TD, shard


def _together_forward(hidden_TD: jax.Array, shard: jax.Array):
    return (hidden_TD, shard), None


def _together_backward(_: None, gradients: tuple[jax.Array, jax.Array]):
    return lax.optimization_barrier(gradients)


_gradients_together.defvjp(_together_forward, _together_backward)


def _others(axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in BATCH_AXES if axis not in axes)


def _block(head: nnx.Param, dtype: Any, axes: tuple[str, ...]) -> jax.Array:
    """This device's columns of the head, all rows; rows are in the order of `_in_order_of`, and
    zeros fill up the last devices' columns.
    """
    if not axes:
        return gather(head, dtype)
    shard_DV = head.get_value().astype(dtype)
    missing = -shard_DV.shape[1] % lax.axis_size(axes)
    shard_DV = jnp.pad(shard_DV, ((0, 0), (0, missing))) if missing else shard_DV
    rows_DV = lax.all_to_all(shard_DV, axes, split_axis=1, concat_axis=0, tiled=True)
    rest = _others(axes)
    return all_gather(rows_DV, rest, 0) if rest else rows_DV


def _in_order_of(hidden_TD: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Hidden states with their width in the order in which `_block` gathers the head's rows:
    shards along the other axes, then along `axes`.
    """
    if axes != BATCH_AXES[:1]:
        return hidden_TD  # that is the order in which they are stored
    first, second = (lax.axis_size(axis) for axis in BATCH_AXES)
    by_shard = hidden_TD.reshape(hidden_TD.shape[0], first, second, -1)
    return jnp.swapaxes(by_shard, 1, 2).reshape(hidden_TD.shape)
