"""Pieces for a training loop of one's own: one's own batches, loss and optax optimizer, on this
package's model and mesh.

    gradients = loss_and_gradients(program, my_loss)
    (loss, layers), grads = gradients(state, program.shard(batch_from_tokens(tokens)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_jax.models.batch import Batch
from moe_jax.models.layer_pattern import expert_layers
from moe_jax.moe.load_balancing import pooled_loss
from moe_jax.moe.stats import LayerStats
from moe_jax.ops.cross_entropy import logits
from moe_jax.parallel.collectives import BATCH_AXES, all_gather
from moe_jax.training import gradients
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram

# (logits [B, S, V] in f32, hidden states [B, S, D], batch) of one device -> losses [B, S]
TokenLoss = Callable[[jax.Array, jax.Array, Batch], jax.Array]
LossAndStats = tuple[jax.Array, LayerStats | None]


def batch_from_tokens(tokens: Sequence[Sequence[int]] | np.ndarray) -> dict[str, np.ndarray]:
    """A batch for `TrainProgram.shard` from texts of at least two tokens, one per row.

    Each token but a row's last has the next one as its target; shorter rows are padded.
    """
    lengths = np.array([len(row) for row in tokens])
    if not len(lengths) or lengths.min() < 2:
        raise ValueError("batch_from_tokens: each row needs at least two tokens")
    whole = np.zeros((len(lengths), lengths.max()), np.int32)
    for number, row in enumerate(tokens):
        whole[number, : len(row)] = row
    place = np.arange(lengths.max() - 1, dtype=np.int32)
    real = place < lengths[:, None] - 1
    return {
        "tokens": whole[:, :-1],
        "targets": whole[:, 1:],
        "positions": np.where(real, place, 0),
        "segments": real.astype(np.int32),
        "mask": real.astype(np.float32),
    }


def loss_and_gradients(
    program: TrainProgram, token_loss: TokenLoss
) -> Callable[[TrainState, Batch], tuple[LossAndStats, Any]]:
    """A compiled function (state, batch) -> ((loss, layer statistics), gradients).

    `token_loss` gives the losses of one device's tokens. `loss` is their mean over the whole batch,
    where its mask is 1, plus the losses of the MoE layers. The gradients are trees like
    `state.params`, sharded alike: any optax transformation takes them.
    """
    experts, layers = program.moe.num_experts, expert_layers(program.model, program.moe)

    def local(params: Any, batch: Batch, tables: Any, expert_LP: jax.Array, key: Any) -> Any:
        count = jnp.maximum(lax.psum(jnp.sum(batch.mask), BATCH_AXES), 1.0)

        def loss(params: Any) -> LossAndStats:
            model = nnx.merge(program.graph, params)
            hidden_BSD, stats = model(batch, tables, None, key)
            hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
            logits_TV = logits(hidden_TD, model.head_weights())
            logits_TV = all_gather(logits_TV, "tensor", 1)
            logits_BSV = logits_TV.reshape(*hidden_BSD.shape[:2], -1)
            losses_BS = token_loss(logits_BSV, hidden_BSD, batch)
            # Every device of the tensor axis has the same: each counts as one part of them.
            mean = lax.pmean(lax.psum(jnp.sum(losses_BS * batch.mask), BATCH_AXES), "tensor")
            total = mean / count
            if stats is not None:
                total = total + jnp.sum(stats.aux_loss) + jnp.sum(stats.z_loss)
                total = total + pooled_loss(program.moe, stats.router, stats.router)
            return total, stats

        result, grads = jax.value_and_grad(loss, has_aux=True)(params)
        return result, gradients.sum_replicas(grads, expert_LP, experts, layers)

    in_specs = (program.param_specs, program.batch_spec, P(), P(None, "expert"), P())
    sharded = jax.shard_map(
        local, mesh=program.mesh, in_specs=in_specs, out_specs=(P(), program.param_specs)
    )

    def compute(state: TrainState, batch: Batch) -> tuple[LossAndStats, Any]:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        return sharded(state.params, batch, state.tables, state.expert_LP, key)

    return jax.jit(compute)
