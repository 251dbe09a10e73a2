"""One training step: gradients inside `shard_map`, the update outside it, on sharded state.

`TrainProgram` holds what is static (mesh, model structure, optimizer) and the compiled functions;
`TrainState` holds all that changes and all that a checkpoint must keep. Needs jax, flax, optax and
numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.config.schema import OptimizerConfig
from moe_jax.models.batch import AnyBatch, Batch, SeriesBatch
from moe_jax.models.chronos.mixture import ChronosMixture
from moe_jax.models.initial_values import PRNG, InitialValue, draw_parameters
from moe_jax.models.layer_pattern import count_moe_layers, expert_layers
from moe_jax.models.parameters import batch_type, make_model
from moe_jax.models.transformer import Transformer
from moe_jax.moe import load_balancing
from moe_jax.moe.router import RouterStats
from moe_jax.moe.tables import LayerTables, make_tables
from moe_jax.ops.cross_entropy import logits
from moe_jax.ops.loops import map_over, scan
from moe_jax.parallel.collectives import BATCH_AXES, psum, vary, vma
from moe_jax.parallel.sharding import specs
from moe_jax.placement.table import Placement
from moe_jax.runtime.platform import platform_of
from moe_jax.training import gradients
from moe_jax.training.optimizer import make_optimizer, make_schedule, refuse_mixed_slots
from moe_jax.training.state import Losses, StepStats, TrainState


class TrainProgram:
    """A model on a mesh, with its compiled train, evaluation and logits functions."""

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        optimizer: OptimizerConfig,
        mesh: Mesh,
        placement: Placement,
        *,
        vocab_size: int,
        steps: int,
        accumulation: int = 1,
        hosts: int = 1,
    ):
        """`placement` is where experts start; states may come to have others of its shape. `hosts`
        share the `expert` axis evenly.
        """
        self.model, self.moe, self.mesh, self.placement = model, moe, mesh, placement
        self.hosts, self.vocab_size, self.accumulation = hosts, vocab_size, accumulation
        self.clip_norm = optimizer.clip_norm
        self.has_moe = count_moe_layers(model, moe) > 0
        self._describe_parameters()
        self.schedule = make_schedule(optimizer, steps)
        self.optimizer = make_optimizer(
            optimizer, self.param_axes, finish_moments=platform_of(mesh.devices.flat[0]).simulated
        )
        self.abstract_state = jax.eval_shape(self._init, np.uint32(0))
        if optimizer.name == "adafactor":
            refuse_mixed_slots(self.abstract_state.params)
        self.state_shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), self._state_specs()
        )
        self.batch_sharding = NamedSharding(mesh, P(BATCH_AXES))
        kind: Any = batch_type(model)
        self.batch_type, self.batch_spec = kind, kind(*[P(BATCH_AXES) for _ in kind._fields])

    def _describe_parameters(self) -> None:
        """Sets the model's graph, and its parameters' partition specs, logical axes and initial
        values.
        """
        key = jax.random.key(0, impl=PRNG)
        abstract: Any = nnx.eval_shape(lambda: self._build(nnx.Rngs(params=key)))
        graph, variables = nnx.split(abstract)
        self.graph: Any = graph
        self.param_specs = nnx.to_pure_dict(specs(variables))

        def described(describe: Callable[[nnx.Variable], Any]) -> Any:
            return nnx.to_pure_dict(
                jax.tree.map(describe, variables, is_leaf=lambda v: isinstance(v, nnx.Variable))
            )

        self.param_axes = described(lambda v: v.get_metadata("axes"))
        self.initial_values = described(InitialValue.of)

    def _build(self, rngs: nnx.Rngs) -> Transformer | ChronosMixture:
        return make_model(self.model, self.moe, self.vocab_size, rngs=rngs)

    def _init(self, seed: jax.Array) -> TrainState:
        tables, expert_LP = make_tables(self.placement, self.hosts)
        params = self._draw(seed, expert_LP)
        zero = jnp.int32(0)
        return TrainState(
            zero,
            jnp.uint32(seed),
            params,
            self.optimizer.init(params),
            tables,
            expert_LP,
            zero,
            zero,
        )

    def _draw(self, seed: jax.Array, expert_LP: jax.Array) -> Any:
        """Each device's parts of the parameters."""
        model = self._build(nnx.Rngs(keys=jax.random.key(seed, impl=PRNG)))
        rows_of = expert_layers(self.model, self.moe)

        def local(keys: Any, expert_LP: jax.Array) -> Any:
            return draw_parameters(self.initial_values, keys, self.param_specs, expert_LP, rows_of)

        in_specs = (P(), P(None, "expert"))
        sharded = self._sharded(local, in_specs, self.param_specs)
        return sharded(nnx.to_pure_dict(nnx.state(model)), expert_LP)

    def _state_specs(self) -> TrainState:
        """Optimizer moments are sharded like their parameters; what has another shape is
        replicated.
        """
        shapes = self.abstract_state
        params = zip(
            jax.tree.leaves_with_path(shapes.params), jax.tree.leaves(self.param_specs), strict=True
        )
        known = {path: (param.shape, spec) for (path, param), spec in params}

        def moment(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> P:
            # A moment's path ends with its parameter's.
            shape, spec = next(
                (known[path[i:]] for i in range(len(path)) if path[i:] in known), (None, P())
            )
            return spec if leaf.shape == shape else P()

        opt = jax.tree.map_with_path(moment, shapes.opt_state)
        return jax.tree.map(lambda _: P(), shapes)._replace(params=self.param_specs, opt_state=opt)

    def init(self, seed: int) -> TrainState:
        """A new state, sharded at birth; the same values on every mesh."""
        return self.init_state(np.uint32(seed))

    @cached_property
    def init_state(self):
        """(uint32 seed) -> `init`."""
        return jax.jit(self._init, out_shardings=self.state_shardings)

    def with_tables(self, state: TrainState, placement: Placement) -> TrainState:
        """The state with the tables of a placement, by which its experts lie already; the bias
        stays.
        """
        tables, expert_LP = jax.device_put(
            make_tables(placement, self.hosts), self.state_shardings.expert_LP
        )
        return state._replace(
            tables=tables._replace(bias_E=state.tables.bias_E), expert_LP=expert_LP
        )

    def shard(self, batch: dict[str, np.ndarray], first_sequence: int = 0) -> Any:
        """This process's rows of a batch as global arrays; `first_sequence` numbers its first row
        within the batch.
        """
        rows = len(next(iter(batch.values())))
        arrays = {
            **batch,
            "sequences": np.arange(first_sequence, first_sequence + rows, dtype=np.int32),
        }
        return self.batch_type(
            **{
                name: jax.make_array_from_process_local_data(self.batch_sharding, arrays[name])
                for name in self.batch_type._fields
            }
        )

    # Inside shard_map: every device's part.

    def _losses(
        self,
        params: Any,
        batch: AnyBatch,
        tables: LayerTables,
        full: RouterStats | None,
        count: jax.Array,
        key: Any,
    ) -> Losses:
        """Losses of a batch, or of a part of one whose counted tokens are `count` in all."""
        model = nnx.merge(self.graph, params)
        ce, stats = model.loss(batch, tables, full, count, key)
        zero = jnp.float32(0)
        aux, z = (jnp.sum(stats.aux_loss), jnp.sum(stats.z_loss)) if stats else (zero, zero)
        if stats:
            aux = aux + load_balancing.pooled_loss(
                self.moe, stats.router, stats.router if full is None else full
            )
        return Losses(ce, aux, z, stats)

    def _local_gradients(
        self, params: Any, batch: AnyBatch, tables: LayerTables, key: jax.Array
    ) -> tuple[Any, Losses]:
        """This device's part of `gradients`."""
        count = jnp.maximum(psum(batch.counted, BATCH_AXES), 1.0)

        def loss(params: Any, part: AnyBatch, full: RouterStats | None) -> tuple[jax.Array, Losses]:
            losses = self._losses(params, part, tables, full, count, key)
            return losses.loss, losses

        gradient = jax.grad(loss, has_aux=True)
        if self.accumulation == 1:
            return gradient(params, batch, None)
        parts = jax.tree.map(lambda a: a.reshape(self.accumulation, -1, *a.shape[1:]), batch)
        full = self._batch_router_sums(params, parts, tables, count, key) if self.has_moe else None

        def add(total: Any, part: AnyBatch) -> tuple[Any, Losses]:
            grads, losses = gradient(params, part, full)
            # The TPU compiler moves a reduce-scatter whose result is only summed out of the loop,
            # with a sum as large as the whole array; with an untied head it failed at that.
            grads = jax.tree.map(lax.optimization_barrier, grads)
            return jax.tree.map(jnp.add, total, grads), losses

        zeros = jax.tree.map(lambda p: vary(jnp.zeros_like(p), vma(p)), params)
        grads, losses = scan(add, zeros, parts)
        return grads, _sum_parts(losses)

    def _batch_router_sums(
        self, params: Any, parts: AnyBatch, tables: LayerTables, count: jax.Array, key: jax.Array
    ) -> RouterStats:
        """The router's sums over the whole batch, which losses over the batch need before any
        part's gradient.

        It costs a forward pass over all parts; without such losses only the number of tokens is
        needed.
        """
        if self.moe.aux_loss or self.moe.variance_loss:

            def sums(part: AnyBatch) -> RouterStats:
                layers = self._losses(params, part, tables, None, count, key).layers
                assert layers is not None
                return layers.router

            return jax.tree.map(lambda a: jnp.sum(a, axis=0), map_over(sums, parts))
        layers, experts = tables.start_E.shape
        routed = parts.routed(self.moe.route_by == "sequence")
        tokens = jnp.broadcast_to(psum(routed, BATCH_AXES), (layers,))
        nothing = jnp.zeros(layers)
        return RouterStats(
            jnp.zeros((layers, experts), jnp.int32),
            jnp.zeros((layers, experts)),
            nothing,
            nothing,
            nothing,
            tokens,
        )

    # Functions of the whole mesh.

    def _sharded(self, local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        """Every device's part `local` as a function of whole arrays."""
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=self.mesh.size > 1,
        )

    def _compiled(self, run: Callable[..., Any], **options: Any) -> Any:
        """`run` under `jax.jit`, with the compiler's options of this platform."""
        platform = platform_of(self.mesh.devices.flat[0])
        return jax.jit(run, compiler_options=dict(platform.compiler_options), **options)

    def gradients(
        self, params: Any, batch: AnyBatch, tables: LayerTables, key: jax.Array
    ) -> tuple[Any, Losses]:
        """Gradients of a whole batch, sharded like the parameters, and its losses; not compiled.
        Replicas of an expert have a gradient each.
        """
        sharded = self._sharded(
            self._local_gradients,
            (self.param_specs, self.batch_spec, P(), P()),
            (self.param_specs, P()),
        )
        return sharded(params, batch, tables, key)

    def _train_step(self, state: TrainState, batch: AnyBatch) -> tuple[TrainState, StepStats]:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        grads, losses = self.gradients(state.params, batch, state.tables, key)
        grads, norm = self._sum_replicas_and_norm(grads, state.expert_LP)
        ok = jnp.isfinite(norm) & jnp.isfinite(losses.loss)
        clip = jnp.minimum(1.0, self.clip_norm / (norm + 1e-6))
        lr = jnp.float32(self.schedule(state.step))
        clipped = jax.tree.map(lambda g: g * clip, grads)
        updates, opt_state = self.optimizer.update(
            clipped, state.opt_state, state.params, ok=ok, lr=lr
        )
        tables = state.tables
        if self.moe.bias_rate and losses.layers is not None:
            bias = load_balancing.update_bias(
                tables.bias_E, losses.layers.router.load_E, self.moe.bias_rate
            )
            tables = tables._replace(bias_E=jnp.where(ok, bias, tables.bias_E))
        after = state._replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            tables=tables,
            skipped=state.skipped + (1 - ok.astype(jnp.int32)),
            skipped_in_row=jnp.where(ok, 0, state.skipped_in_row + 1),
        )
        return after, StepStats(
            loss=losses.loss,
            grad_norm=norm,
            lr=lr,
            skipped=after.skipped,
            skipped_in_row=after.skipped_in_row,
            **losses._asdict(),
        )

    def _sum_replicas_and_norm(self, grads: Any, expert_LP: jax.Array) -> tuple[Any, jax.Array]:
        """Gradients summed over the replicas of each expert, and their global norm."""
        experts, layers = self.moe.num_experts, expert_layers(self.model, self.moe)

        def local(grads: Any, expert_LP: jax.Array) -> tuple[Any, jax.Array]:
            grads = gradients.sum_replicas(grads, expert_LP, experts, layers)
            return grads, gradients.norm(grads, expert_LP, experts, layers)

        specs = (self.param_specs, P(None, "expert"))
        return self._sharded(local, specs, (self.param_specs, P()))(grads, expert_LP)

    @cached_property
    def train_step(self):
        """(state, batch) -> (state, StepStats); the given state's buffers are reused where the
        platform can. A step that is not finite changes nothing but the counts of steps.
        """
        return self._compiled(
            self._train_step,
            donate_argnums=(0,) if platform_of(self.mesh.devices.flat[0]).donates else (),
            out_shardings=(self.state_shardings, NamedSharding(self.mesh, P())),
        )

    @cached_property
    def eval_step(self):
        """(params, tables, batch) -> (sum of losses in nats, counted tokens), without noise."""

        def local(params: Any, tables: LayerTables, batch: AnyBatch) -> tuple[jax.Array, jax.Array]:
            losses = self._losses(params, batch, tables, None, jnp.float32(1.0), None)
            return losses.ce_loss, psum(batch.counted, BATCH_AXES)

        return self._compiled(self._sharded(local, (self.param_specs, P(), self.batch_spec), P()))

    @cached_property
    def forecast_step(self):
        """(params, tables, batch) -> quantiles f32 [B, Q, H] in units of the series, of a
        forecaster.
        """

        def local(params: Any, tables: LayerTables, batch: SeriesBatch) -> jax.Array:
            return nnx.merge(self.graph, params).predict(batch, tables)

        return self._compiled(
            self._sharded(local, (self.param_specs, P(), self.batch_spec), P(BATCH_AXES))
        )

    @cached_property
    def next_logits(self):
        """(params, tables, batch, last_B) -> f32 [B, V], the logits after position last_B of each
        sequence.
        """

        def local(params: Any, tables: LayerTables, batch: Batch, last_B: jax.Array) -> jax.Array:
            model = nnx.merge(self.graph, params)
            hidden_BSD, _ = model(batch, tables)
            hidden_BD = jnp.take_along_axis(hidden_BSD, last_B[:, None, None], axis=1)[:, 0]
            return logits(hidden_BD, model.head_weights())

        in_specs = (self.param_specs, P(), self.batch_spec, P(BATCH_AXES))
        return self._compiled(self._sharded(local, in_specs, P(BATCH_AXES, "tensor")))


def _sum_parts(parts: Losses) -> Losses:
    """A batch's losses and statistics from those of its parts: sums, except the number of rounds,
    which is the largest.
    """
    total = jax.tree.map(lambda a: jnp.sum(a, axis=0), parts)
    if parts.layers is None:
        return total
    return total._replace(layers=total.layers._replace(rounds=jnp.max(parts.layers.rounds, axis=0)))
