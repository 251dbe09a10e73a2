"""One MoE layer alone on a mesh, forward and backward, on random inputs: what `scripts/benchmark.py
layer` times.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config.model import MoEConfig
from moe_jax.moe.layer import MoE
from moe_jax.moe.tables import make_tables
from moe_jax.parallel.collectives import BATCH_AXES
from moe_jax.parallel.sharding import specs
from moe_jax.placement.table import contiguous


class SingleLayer(NamedTuple):
    """Jitted functions of a layer, and arguments for them."""

    forward: Any  # (params, x) -> (y, LayerStats)
    # (params, x, dy) -> gradients of sum(y * dy) + the layer's losses, with respect to params and x
    backward: Any
    params: Any
    x_BSD: jax.Array
    dy_BSD: jax.Array


def make_layer(
    moe: MoEConfig, width: int, tokens: int, dtype: Any, mesh: Mesh, *, f32_weights: bool = False
) -> SingleLayer:
    """A freshly drawn layer and normal inputs of `tokens` tokens over all devices, one sequence on
    each.

    Weights are held in `dtype`, the router's in f32; with `f32_weights` all are f32 and are
    converted in each pass, as in training. `tokens` must be a multiple of the devices on `data` and
    `expert`.
    """
    workers = mesh.shape["data"] * mesh.shape["expert"]
    placement = contiguous(1, moe.num_experts, mesh.shape["expert"])
    tables = jax.tree.map(lambda a: jnp.asarray(a[0]), make_tables(placement)[0])

    def make():
        return MoE(moe, width, moe.hidden**-0.5, rngs=nnx.Rngs(0))

    graph, variables = nnx.split(nnx.eval_shape(make))
    param_specs, x_spec = nnx.to_pure_dict(specs(variables)), P(BATCH_AXES)

    def held(path: Any, value: jax.Array) -> jax.Array:
        router = any(getattr(entry, "key", None) == "router" for entry in path)
        return value if router or f32_weights else value.astype(dtype)

    def draw() -> Any:
        x_BSD, dy_BSD = (
            jax.random.normal(jax.random.key(seed), (workers, tokens // workers, width), dtype)
            for seed in (1, 2)
        )
        return jax.tree.map_with_path(held, nnx.to_pure_dict(nnx.state(make()))), x_BSD, dy_BSD

    def forward(params: Any, x_BSD: jax.Array) -> Any:
        return nnx.merge(graph, params)(x_BSD, jnp.ones(x_BSD.shape[:2], bool), tables)

    def backward(params: Any, x_BSD: jax.Array, dy_BSD: jax.Array) -> Any:
        def loss(params: Any, x_BSD: jax.Array) -> jax.Array:
            y_BSD, stats = forward(params, x_BSD)
            return (
                jnp.vdot(y_BSD.astype(jnp.float32), dy_BSD.astype(jnp.float32))
                + stats.aux_loss
                + stats.z_loss
            )

        return jax.grad(loss, argnums=(0, 1))(params, x_BSD)

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (param_specs, x_spec, x_spec))
    params, x_BSD, dy_BSD = jax.jit(draw, out_shardings=shardings)()
    ahead = jax.shard_map(
        forward, mesh=mesh, in_specs=(param_specs, x_spec), out_specs=(x_spec, P())
    )
    both = jax.shard_map(
        backward, mesh=mesh, in_specs=(param_specs, x_spec, x_spec), out_specs=(param_specs, x_spec)
    )
    return SingleLayer(jax.jit(ahead), jax.jit(both), params, x_BSD, dy_BSD)
