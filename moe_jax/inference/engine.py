"""Inference: new tokens in, logits out, with the keys and values of earlier tokens in a cache.

    engine = ResidentEngine(plan, params, tables)
    logits_BV, cache = engine.prefill(engine.layout.new(batch=2, length=1024), prompts)
    logits_BV, cache = engine.decode(cache, next_tokens)

An engine holds its weights, its routing tables and its compiled programs; callers give it the cache
and new tokens alone. `Engine` is what sessions, evaluation and benchmarks use of one. The one here
keeps all experts on the devices; that of offload.py keeps some of them.

All devices of the `expert` and `tensor` axes see the same tokens, so a layer needs two sums over
them, one after attention and one after the experts (Megatron-LM, Shoeybi et al., 2019). The `data`
axis splits rows. On one device the program holds no collective.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.inference.expert_cache import ExpertCounts
from moe_jax.inference.expert_migration import ServedExperts, tables_of
from moe_jax.inference.kv_cache import Cache, CacheLayout
from moe_jax.inference.output import all_logits, last_logits, total_nats
from moe_jax.models.batch import NewTokens
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.models.transformer import Transformer
from moe_jax.moe.tables import LayerTables
from moe_jax.parallel.collectives import psum
from moe_jax.parallel.half_bits import as_bits
from moe_jax.placement.table import Placement
from moe_jax.runtime.platform import platform_of

NEW_TOKENS_SPEC = NewTokens._make(P("data") for _ in NewTokens._fields)


@runtime_checkable
class Engine(Protocol):
    """A model that is ready to run. Logits stay on the devices until a caller fetches them."""

    @property
    def plan(self) -> ServingPlan:
        """The model, its mesh and how its weights are held."""

    @property
    def layout(self) -> CacheLayout:
        """Shapes of its cache."""

    @property
    def expert_counts(self) -> ExpertCounts | None:
        """How often experts were found on the device, since the model was opened; None where all of
        them are there.
        """

    def expert_figures(self) -> dict[str, Any]:
        """What `moe-jax bench` shows of the experts' cache; empty where there is none."""

    def prefill(self, cache: Cache, new: NewTokens) -> tuple[jax.Array, Cache]:
        """Reads the first tokens of all rows: logits after each row's last new token, f32 [B, V],
        and the cache with the new tokens.

        No row of the given cache may hold tokens: the new ones look at each other alone. The given
        cache's memory is used again.
        """

    def decode(self, cache: Cache, new: NewTokens) -> tuple[jax.Array, Cache]:
        """As `prefill`, for new tokens of rows whose earlier tokens the cache holds.

        One new token per row is a decoding step. Several per row read the rest of a long prompt in
        chunks, or a prompt into a row that came free. start + S must not exceed the cache's places.
        """

    def all_logits(self, new: NewTokens) -> jax.Array:
        """Logits at every position of new rows, f32 [B, S, V]; those of padding mean nothing."""

    def score(self, tokens_BS: Any, targets_BS: Any, mask_BS: Any) -> tuple[float, float]:
        """Sum of the negative log-likelihoods, nats, of targets where `mask_BS` is 1, and their
        number. B is a multiple of `data`.

        Raises UserError for tokens that the model does not have.
        """


class ResidentEngine:
    """An `Engine` with all experts on the devices."""

    expert_counts: ExpertCounts | None = None

    def __init__(self, plan: ServingPlan, params: Any, tables: LayerTables):
        """`params` may be `plan.abstract_params()`: programs can then be lowered, and not run."""
        self.plan, self.params, self.tables = plan, params, tables
        self.layout = CacheLayout(plan)
        self.placement = plan.placement
        """Where experts are now."""
        self._moves: ServedExperts | None = None
        self._load_LP: jax.Array | None = None
        self._total_LP: np.ndarray | None = None

    def count_choices(self) -> None:
        """From now on `decode` counts how many choices go to each slot, if there are experts;
        another program, of the same arithmetic.
        """
        shape = self.placement.physical_to_logical.shape
        if shape[0]:
            self._total_LP = np.zeros(shape, np.int64)
            self._load_LP = self._no_choices()

    def choices(self) -> np.ndarray | None:
        """Choices that went to each slot since `count_choices`, or since experts moved, i64
        [MoE layers, P]; None where they are not counted. It waits for the devices.
        """
        if self._total_LP is not None:
            self._total_LP = self._total_LP + np.asarray(self._load_LP)
            self._load_LP = self._no_choices()  # they would overflow in the end
        return self._total_LP

    def _no_choices(self) -> jax.Array:
        assert self._total_LP is not None
        everywhere = NamedSharding(self.plan.mesh, P())
        return jnp.zeros(self._total_LP.shape, jnp.int32, device=everywhere)

    def let_experts_move(self) -> int:
        """From now on where experts are changes no bit of what a counted `decode` gives, and
        `move_experts` may be called. Returns how many experts a device sends in one call at most.
        """
        self._moves = self._moves or ServedExperts(self.plan, self._held)
        return self._moves.budget

    def move_experts(self, new: Placement) -> None:
        """Brings experts to where the table says, and counts choices from there on. Returns when
        they are there; the weights' memory is used again.
        """
        assert self._moves is not None, "let_experts_move comes first"
        self._held = self._moves(self._held, self.placement, new)
        self.params = self._held  # the old arrays are gone
        self.tables = tables_of(self.plan.mesh, new, self.tables.bias_E)
        self.placement = new
        if self._total_LP is not None:
            self.count_choices()

    def expert_figures(self) -> dict[str, Any]:
        """None: no expert is fetched."""
        return {}

    def prefill(self, cache: Cache, new: NewTokens) -> tuple[jax.Array, Cache]:
        """As `Engine.prefill`."""
        return self._prefill(self._held, self.tables, cache, new)

    def decode(self, cache: Cache, new: NewTokens) -> tuple[jax.Array, Cache]:
        """As `Engine.decode`."""
        if self._load_LP is None:
            return self._decode(self._held, self.tables, cache, new)
        decode = self._decode_counted if self._moves is None else self._decode_in_order
        logits_BV, cache, self._load_LP = decode(self._held, self.tables, cache, new, self._load_LP)
        return logits_BV, cache

    def all_logits(self, new: NewTokens) -> jax.Array:
        """As `Engine.all_logits`."""
        return self._all_logits(self._held, self.tables, new)

    def score(self, tokens_BS: Any, targets_BS: Any, mask_BS: Any) -> tuple[float, float]:
        """As `Engine.score`."""
        nats, count = self._score(
            self._held, self.tables, *score_arguments(self.plan, tokens_BS, targets_BS, mask_BS)
        )
        return float(nats), float(count)

    # Compiled programs. `tables` are replicated; new tokens are split over `data`.

    def lower_decode(self, batch: int, places: int) -> jax.stages.Lowered:
        """The step of one new token per row, as it is before it is compiled."""
        return self.trace_decode(batch, places).lower()

    def trace_decode(self, batch: int, places: int, width: int = 1) -> jax.stages.Traced:
        """The same step as JAX has written it down, of `width` new tokens per row."""
        new, cache = _abstract_tokens(batch, width), self.layout.abstract(batch, places)
        return self._decode.trace(self._held, self.tables, cache, new)

    def trace_prefill(self, batch: int, width: int, places: int) -> jax.stages.Traced:
        """The program of `prefill` as JAX has written it down."""
        new, cache = _abstract_tokens(batch, width), self.layout.abstract(batch, places)
        return self._prefill.trace(self._held, self.tables, cache, new)

    def lower_all_logits(self, batch: int, length: int) -> jax.stages.Lowered:
        """The program of `all_logits`, as it is before it is compiled."""
        return self._all_logits.lower(self._held, self.tables, _abstract_tokens(batch, length))

    @cached_property
    def _held(self) -> Any:
        """The weights as programs take them."""
        return as_bits(self.params, self.plan.mesh)

    @cached_property
    def _prefill(self) -> Any:
        return self._compile_over_cache(Transformer.prefill)

    @cached_property
    def _decode(self) -> Any:
        return self._compile_over_cache(Transformer.decode)

    @cached_property
    def _decode_counted(self) -> Any:
        return self._compile_counted(in_order=False)

    @cached_property
    def _decode_in_order(self) -> Any:
        return self._compile_counted(in_order=True)

    def _compile_counted(self, in_order: bool) -> Any:
        def local(
            params: Any, tables: LayerTables, cache: Cache, new: NewTokens, load_LP: jax.Array
        ) -> Any:
            transformer = self._transformer(params)
            hidden_BSD, cache, more_LP = transformer.decode_counted(new, tables, cache, in_order)
            load_LP = load_LP + psum(more_LP, ("data",))
            return last_logits(transformer, hidden_BSD, new), cache, load_LP

        in_specs = (self.plan.param_specs, P(), self.layout.specs, NEW_TOKENS_SPEC, P())
        out_specs = (P("data"), self.layout.specs, P())
        return compile_on(self.plan.mesh, local, in_specs, out_specs, donated=(2,))

    def _compile_over_cache(self, through_model: Any) -> Any:
        def local(params: Any, tables: LayerTables, cache: Cache, new: NewTokens) -> Any:
            transformer = self._transformer(params)
            hidden_BSD, cache = through_model(transformer, new, tables, cache)
            return last_logits(transformer, hidden_BSD, new), cache

        in_specs = (self.plan.param_specs, P(), self.layout.specs, NEW_TOKENS_SPEC)
        out_specs = (P("data"), self.layout.specs)
        return compile_on(self.plan.mesh, local, in_specs, out_specs, donated=(2,))

    @cached_property
    def _all_logits(self) -> Any:
        def local(params: Any, tables: LayerTables, new: NewTokens) -> jax.Array:
            return all_logits(*self._hidden(params, tables, new))

        in_specs = (self.plan.param_specs, P(), NEW_TOKENS_SPEC)
        return compile_on(self.plan.mesh, local, in_specs, P("data"))

    @cached_property
    def _score(self) -> Any:
        def local(
            params: Any, tables: LayerTables, new: NewTokens, targets_BS: Any, mask_BS: Any
        ) -> tuple[jax.Array, jax.Array]:
            return total_nats(*self._hidden(params, tables, new), targets_BS, mask_BS)

        in_specs = (self.plan.param_specs, P(), NEW_TOKENS_SPEC, P("data"), P("data"))
        return compile_on(self.plan.mesh, local, in_specs, P())

    def _transformer(self, params: Any) -> Transformer:
        return nnx.merge(self.plan.graph, params)

    def _hidden(
        self, params: Any, tables: LayerTables, new: NewTokens
    ) -> tuple[Transformer, jax.Array]:
        """Final hidden states of whole rows, through a cache that is thrown away."""
        transformer, kv_axes = self._transformer(params), self.plan.kv_axes
        parts = lax.axis_size(kv_axes) if kv_axes else 1
        batch, length = new.tokens.shape
        empty = self.layout.zeros(batch, length, parts)
        empty = jax.tree.map(lambda a: lax.pcast(a, ("data", *kv_axes), to="varying"), empty)
        return transformer, transformer.prefill(new, tables, empty)[0]


def compile_on(
    mesh: Mesh | AbstractMesh,
    local: Any,
    in_specs: Any,
    out_specs: Any,
    donated: tuple[int, ...] = (),
) -> Any:
    """The compiled function that every device of the mesh runs on its parts; `donated` arguments
    give up their memory where the platform can use it again.

    A device alone need not track which values vary: doing so would take a sum with itself, a
    collective.
    """
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=mesh.size > 1
    )
    donates = bool(donated) and platform_of(mesh.devices.flat[0]).donates
    return jax.jit(sharded, donate_argnums=donated if donates else ())


def score_arguments(
    plan: ServingPlan, tokens_BS: Any, targets_BS: Any, mask_BS: Any
) -> tuple[NewTokens, np.ndarray, np.ndarray]:
    """Whole rows to score, checked against the model's vocabulary."""
    plan.check_tokens(int(max(np.max(tokens_BS, initial=0), np.max(targets_BS, initial=0))))
    rows = NewTokens.whole_rows(tokens_BS)
    return rows, np.asarray(targets_BS, np.int32), np.asarray(mask_BS, np.float32)


def _abstract_tokens(batch: int, length: int) -> NewTokens:
    return jax.eval_shape(lambda: NewTokens.whole_rows(jnp.zeros((batch, length), jnp.int32)))
