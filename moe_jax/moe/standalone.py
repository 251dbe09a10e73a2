"""A mixture-of-experts layer for a model of one's own.

    layer = MoELayer(MoEConfig(num_experts=8, top_k=2, hidden=64), width=32, expert="model",
                     rngs=nnx.Rngs(0))
    y_BSD, stats = layer(x_BSD)
    loss = my_loss(y_BSD) + stats.aux_loss + stats.z_loss

The layer is a plain `nnx.Module`. It looks at the mesh of its input and does one of three things:

- no mesh: all experts are computed on the one device;
- a mesh with Auto or Explicit axes (a plain `jax.jit`): it opens a `shard_map` of its own;
- inside a `jax.shard_map` of the caller: it uses the caller's axes, and `x_BSD` is one device's
  part of the batch.

`data` names the mesh axes that split tokens, `expert` the one that splits tokens and experts.
Experts are stored as `specs(nnx.state(layer))` says; all else is the same on every device.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config.model import MoEConfig
from moe_jax.errors import UserError
from moe_jax.moe import load_balancing
from moe_jax.moe.layer import MoE
from moe_jax.moe.stats import LayerStats
from moe_jax.moe.tables import LayerTables
from moe_jax.parallel.collectives import AxisNames, MeshAxes, axis_names, vma
from moe_jax.parallel.sharding import RULES, apply_rules, specs
from moe_jax.placement.table import Placement
from moe_jax.utils.annotations import Array, Bool, Float, Key

NO_AXES = MeshAxes((), (), ())


class MoELayer(nnx.Module):
    """Router, experts and shared experts, with or without a mesh."""

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        *,
        data: AxisNames = (),
        expert: AxisNames = (),
        rngs: nnx.Rngs,
    ):
        """`width` is that of the tokens. Of `config` the settings that choose a model's layers
        (`first_dense`, `every`, `dense_layers`) mean nothing here.

        Raises UserError for `aux_over="model"`, which needs all layers of a model at once.
        """
        if config.aux_over == "model":
            raise UserError("moe.aux_over=model is a loss over several layers: use layer.")
        self.config = config
        self.axes = MeshAxes(data, expert, ())
        self.moe = MoE(config, width, config.hidden**-0.5, rngs=rngs)
        apply_rules(self.moe, dict.fromkeys(RULES, ()) | {"slots": axis_names(expert)})
        experts = config.num_experts
        self.expert_in_slot = nnx.Variable(jnp.arange(experts, dtype=jnp.int32))
        self.balance_bias = nnx.Variable(jnp.zeros(experts, jnp.float32))

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        valid_BS: Bool[Array, "B S"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerStats]:
        """The experts' output, and statistics over all tokens: `aux_loss` and `z_loss` (weighted,
        to be added to the loss), `kept` and `dropped` choices, `router.load_E`.

        `valid_BS` is False at padding; `key` turns on the noise that the configuration asks for.

        Raises UserError where the mesh does not have the named axes, or does not divide the batch
        or the experts.
        """
        if valid_BS is None:
            valid_BS = jnp.ones_like(x_BSD[..., 0], dtype=bool)
        mesh, axes = _mesh_of(x_BSD), self.axes.batch
        if mesh.empty or not axes:
            return self._local(NO_AXES, self._state(), x_BSD, valid_BS, key)
        if missing := set(axes) - set(mesh.axis_names):
            raise UserError(
                f"MoELayer: the mesh has no axis {sorted(missing)[0]!r}: its axes are "
                f"{', '.join(map(str, mesh.axis_names))}."
            )
        ranks = _size(mesh, self.axes.expert)
        if self.config.num_experts % ranks:
            raise UserError(
                f"MoELayer: the {ranks} devices of expert={self.axes.expert!r} do not divide "
                f"num_experts={self.config.num_experts}: choose a multiple."
            )
        manual = {axis for axis in axes if axis in mesh.manual_axes}
        if not manual:
            return self._over_mesh(mesh, x_BSD, valid_BS, key)
        if manual != set(axes):
            raise UserError(
                f"MoELayer: the shard_map around it has axis {sorted(manual)[0]!r} and not "
                f"{sorted(set(axes) - manual)[0]!r}: give it both."
            )
        return self._inside(mesh, x_BSD, valid_BS, key)

    def _state(self) -> Any:
        """The arrays that a pass needs: parameters, expert in each slot, balance bias."""
        params = nnx.to_pure_dict(nnx.state(self.moe))
        return params, self.expert_in_slot.get_value(), self.balance_bias.get_value()

    def _local(
        self, axes: MeshAxes, state: Any, x_BSD: jax.Array, valid_BS: jax.Array, key: Any
    ) -> tuple[jax.Array, LayerStats]:
        """The layer on this device's tokens; inside `shard_map` where there are axes."""
        params, expert_P, bias_E = state
        slots_P = jnp.argsort(expert_P).astype(jnp.int32)
        each_E = jnp.arange(expert_P.shape[0], dtype=jnp.int32)
        tables = LayerTables(slots_P[None], each_E, jnp.ones_like(each_E)[None], bias_E)
        keys_B = None
        if key is not None:
            first = lax.axis_index(axes.batch) * x_BSD.shape[0]
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
                key, first + jnp.arange(x_BSD.shape[0])
            )
        moe = nnx.merge(nnx.graphdef(self.moe), params)
        return moe(x_BSD, valid_BS, tables, keys_B=keys_B, axes=axes)

    def _over_mesh(
        self, mesh: AbstractMesh, x_BSD: jax.Array, valid_BS: jax.Array, key: Any
    ) -> tuple[jax.Array, LayerStats]:
        """The layer in a `shard_map` of its own, over the whole batch."""
        axes = self.axes
        devices = _size(mesh, axes.batch)
        if x_BSD.shape[0] % devices:
            raise UserError(
                f"MoELayer: {devices} devices split the batch over {' and '.join(axes.batch)}, and "
                f"{x_BSD.shape[0]} sequences do not divide among them: choose a multiple."
            )
        tokens = P(axes.batch)
        in_specs = ((nnx.to_pure_dict(specs(nnx.state(self.moe))), P(), P()), tokens, tokens, P())
        args = (self._state(), x_BSD, valid_BS, key)
        explicit = AxisType.Explicit in mesh.axis_types
        if explicit:  # shard_map then takes arrays only as they are sharded
            args = _resharded(mesh, in_specs, args)

        def local(state: Any, x_BSD: jax.Array, valid_BS: jax.Array, key: Any) -> Any:
            return self._local(axes, state, x_BSD, valid_BS, key)

        sharded = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(tokens, P()))
        # Compiled, so that a call outside jit works with the mesh of its arguments too.
        y_BSD, stats = jax.jit(sharded)(*args)
        if explicit:
            y_BSD = jax.sharding.reshard(y_BSD, _sharding_of(x_BSD))
        return y_BSD, stats

    def _inside(
        self, mesh: AbstractMesh, x_BSD: jax.Array, valid_BS: jax.Array, key: Any
    ) -> tuple[jax.Array, LayerStats]:
        """The layer inside the caller's `shard_map`. Where some of the axes hold the same tokens,
        each of their devices takes a part, and the output is gathered.
        """
        axes = self.axes
        if any(axis not in vma(lax.axis_index(axis)) for axis in axes.batch):
            raise UserError(
                "MoELayer: gradients need shard_map's check_vma=True, its default: leave it out."
            )
        slots = self.moe.experts.down.get_value().shape[0]
        if slots * _size(mesh, axes.expert) != self.config.num_experts:
            raise UserError(
                f"MoELayer: a device has {slots} of {self.config.num_experts} experts: give "
                f"shard_map in_specs=specs(nnx.state(layer)) for the layer's arrays."
            )
        same = tuple(a for a in axes.batch if a not in vma(x_BSD) and mesh.shape[a] > 1)
        parts = _size(mesh, same)
        if x_BSD.shape[0] % parts:
            raise UserError(
                f"MoELayer: {parts} devices hold the same tokens over {' and '.join(same)}, and "
                f"{x_BSD.shape[0]} sequences do not divide among them: choose a multiple."
            )
        if same:
            rows = x_BSD.shape[0] // parts
            start = lax.axis_index(same) * rows
            x_BSD, valid_BS = (lax.dynamic_slice_in_dim(a, start, rows) for a in (x_BSD, valid_BS))
        y_BSD, stats = self._local(axes, self._state(), x_BSD, valid_BS, key)
        if same:
            y_BSD = lax.all_gather(y_BSD, same, axis=0, tiled=True, to="invarying")
        return y_BSD, stats

    def update_bias(self, stats: LayerStats) -> None:
        """Moves the balance bias by `config.bias_rate` against the load of a step (DeepSeek-V3)."""
        load_E, bias_E = stats.router.load_E, self.balance_bias.get_value()
        rate = self.config.bias_rate
        self.balance_bias.set_value(load_balancing.update_bias(bias_E[None], load_E[None], rate)[0])

    def place(self, placement: Placement) -> np.ndarray:
        """Moves the experts into the slots of a table of one layer, without replicas.

        Returns for each slot the slot that its expert was in, int32 [P]: an optimizer's arrays of
        the experts move alike, `moment[source]`.

        Raises UserError for another kind of table.
        """
        table_LP = placement.physical_to_logical
        if table_LP.shape != (1, self.config.num_experts):
            raise UserError(
                f"MoELayer.place: the table is for {len(table_LP)} layers and "
                f"{table_LP.shape[1]} slots: give one layer with a slot for each of the "
                f"{self.config.num_experts} experts."
            )
        before_P = np.asarray(self.expert_in_slot.get_value())
        source_P = np.argsort(before_P)[table_LP[0]].astype(np.int32)
        experts = self.moe.experts
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            if hasattr(experts, name):
                variable = getattr(experts, name)
                variable.set_value(_take_rows(variable.get_value(), source_P))
        held_P = self.expert_in_slot.get_value()
        self.expert_in_slot.set_value(jax.device_put(jnp.asarray(table_LP[0]), held_P.sharding))
        return source_P


def _mesh_of(x: jax.Array) -> AbstractMesh:
    """The mesh that a computation on `x` is for: the one in use, else that of the array."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty else _sharding_of(x).mesh


def _sharding_of(x: jax.Array) -> Any:
    """How the type of `x` is sharded, traced or not."""
    kind: Any = jax.typeof(x)
    return kind.sharding


def _size(mesh: AbstractMesh, axes: AxisNames) -> int:
    return math.prod(mesh.shape[axis] for axis in axis_names(axes))


def _take_rows(x: jax.Array, rows: np.ndarray) -> jax.Array:
    """Rows of `x`, sharded as it is."""
    explicit = AxisType.Explicit in _sharding_of(x).mesh.axis_types
    sharding: Any = x.sharding if explicit else None
    taken = x.at[rows].get(out_sharding=sharding)
    return jax.device_put(taken, x.sharding)


def _resharded(mesh: AbstractMesh, in_specs: Any, args: Any) -> Any:
    """`args` sharded by a tree of specs, of which one may stand for a subtree."""

    def reshard(spec: P, part: Any) -> Any:
        return jax.tree.map(lambda a: jax.sharding.reshard(a, NamedSharding(mesh, spec)), part)

    return jax.tree.map(reshard, in_specs, args, is_leaf=lambda x: isinstance(x, P))
