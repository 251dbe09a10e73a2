"""Inference: new tokens in, logits out, with the keys and values of earlier tokens in a cache.

`Engine` holds what is static and the compiled functions; weights, tables and cache are given to
each call. Weights are held as `Matrix`es (ops/linear.py), each device its part, and nothing is
gathered: attention heads, hidden and vocabulary dims are split over `tensor` and, where they
divide, over `expert` too; experts over `expert`. All devices of these axes see the same tokens, so
a layer needs two sums over them, one after attention and one after the experts (Megatron-LM,
Shoeybi et al., 2019). The `data` axis splits sequences. On one device the program holds no
collective.

Needs jax, flax, optax and numpy alone.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.errors import UserError
from moe_jax.models.batch import LayerCache, NewTokens
from moe_jax.models.layer_pattern import layer_kinds, stack_layers
from moe_jax.models.paths import ParameterPath
from moe_jax.models.transformer import Transformer
from moe_jax.models.weight_layout import WeightPlan, bytes_of, plan_weight
from moe_jax.moe.tables import LayerTables
from moe_jax.ops.cross_entropy import linear_cross_entropy, logits
from moe_jax.ops.quantized import Kind
from moe_jax.parallel.collectives import psum
from moe_jax.parallel.sharding import apply_rules, axes_of, named, serving_rules, specs
from moe_jax.placement.table import Placement
from moe_jax.runtime.platform import platform_of

NEW_TOKENS_SPEC = NewTokens._make(P("data") for _ in NewTokens._fields)
Cache = list[list[LayerCache]]


class Engine:
    """A model on a mesh, for inference."""

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        mesh: Mesh | AbstractMesh,
        placement: Placement,
        *,
        vocab_size: int,
        dtype: str = "float32",
        quantization: Kind = "float",
        group: int = 64,
    ):
        """`dtype` is that of weights, activations and cache. With an abstract mesh there is a plan
        and nothing that runs.

        Raises UserError where the mesh does not divide the model.
        """
        compute: dict[str, Any] = {"compute_dtype": dtype}
        self.model = dataclasses.replace(model, **compute)
        self.moe, self.mesh, self.placement, self.vocab_size = moe, mesh, placement, vocab_size
        self.dtype = jnp.dtype(dtype)
        _check_mesh(model, moe, mesh)
        abstract = nnx.eval_shape(
            lambda: Transformer(self.model, moe, vocab_size, rngs=nnx.Rngs(0))
        )
        hiddens = (model.hidden, moe.shared_width or model.hidden)
        rules = serving_rules(
            mesh,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            head_inputs=model.num_heads * model.value_width,
            hiddens=hiddens,
            vocab=vocab_size,
            group=group if quantization == "int4" else 1,
        )
        apply_rules(abstract, rules)
        self.kv_axes = () if model.latent.kv_rank else rules["kv_heads"]
        self.graph, variables = nnx.split(abstract)
        self.plans = self._plan(variables, quantization, group)
        self.param_specs = self.tree({path: leaf.held_spec() for path, leaf in self.plans.items()})
        self.param_shardings = named(mesh, self.param_specs)

    def _plan(self, variables: Any, kind: Kind, group: int) -> dict[str, WeightPlan]:
        found = {}
        pairs = zip(
            nnx.to_flat_state(variables),
            jax.tree.leaves(specs(variables), is_leaf=lambda x: isinstance(x, P)),
            strict=True,
        )
        for (keys, variable), spec in pairs:
            path, names, shape = (
                "/".join(map(str, keys)),
                variable.get_metadata("axes"),
                variable.get_value().shape,
            )
            if "experts" in keys:
                shape = (shape[0], self.placement.num_slots, *shape[2:])
            # Dims that are summed over are the last ones, and cut where heads or hidden dims are.
            cut = (
                [axis for axes in variable.get_metadata("mesh_axes")[-2:] for axis in axes]
                if ParameterPath.parse(path).is_output_first
                else []
            )
            parts = math.prod(self.mesh.shape[axis] for axis in cut)
            found[path] = plan_weight(
                path, shape, names, spec, dtype=self.dtype, kind=kind, group=group, parts=parts
            )
        return found

    def tree(self, by_path: dict[str, Any]) -> Any:
        """Nested dicts, as the model takes its parameters, from values by path."""
        root: dict[Any, Any] = {}
        for path, value in by_path.items():
            *folders, name = (int(key) if key.isdigit() else key for key in path.split("/"))
            node = root
            for key in folders:
                node = node.setdefault(key, {})
            node[name] = value
        return root

    def decode_bytes(self, batch: int) -> int:
        """Bytes of weights that a decode step of `batch` rows must read, over all devices, each
        part of them once.

        With several rows it counts the experts that even, independent choices would touch on
        average.
        """
        experts, top_k = self.moe.num_experts, self.moe.top_k
        touched = experts * (1 - (1 - top_k / experts) ** batch)
        total = 0.0
        for path, leaf in self.plans.items():
            size = bytes_of(leaf)
            if path == "embedding" and not self.model.tied_embeddings:
                size = batch * self.model.width * self.dtype.itemsize  # rows of it alone
            total += size * touched / self.placement.num_slots if "/experts/" in path else size
        return round(total)

    def check_tokens(self, largest: int) -> None:
        """Refuses tokens that the model has no row for, which would read as nothing."""
        if largest >= self.vocab_size:
            raise UserError(
                f"The text has token {largest} and the model a vocabulary of {self.vocab_size}: "
                f"its tokenizer is another model's."
            )

    def pack(self, params: Any, *, consume: bool = False) -> Any:
        """Weights to serve from training parameters with experts in the engine's slots.

        With `consume` the parameters are given up, one after another, so that both are never in
        memory whole.
        """
        packed = {}
        for path, leaf in self.plans.items():
            value = params
            for key in path.split("/"):
                value = value[int(key) if key.isdigit() else key]

            def pack(a, leaf=leaf):
                return leaf.pack(a if leaf.order is None else a.transpose(leaf.order))

            packed[path] = jax.block_until_ready(
                jax.jit(pack, out_shardings=named(self.mesh, leaf.held_spec()))(value)
            )
            if consume:
                value.delete()
        return self.tree(packed)

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` sequences (a multiple of the `data` axis) of up to `length`
        tokens.
        """
        shapes, shardings = self.abstract_cache(batch, length)
        return jax.tree.map(
            lambda a, sharding: jnp.zeros(a.shape, a.dtype, device=sharding), shapes, shardings
        )

    def abstract_cache(self, batch: int, length: int) -> tuple[Any, Any]:
        """Shapes and dtypes of the arrays of `new_cache`, and their shardings."""
        shardings = named(self.mesh, self._cache_specs)
        return jax.eval_shape(lambda: self._zeros(batch, length, 1)), shardings

    def _zeros(self, batch: int, length: int, parts: int) -> Cache:
        """Zeros for one of `parts` of the key heads."""
        model = self.model

        def layer(repeats: int) -> LayerCache:
            if model.latent.kv_rank:
                width = model.latent.kv_rank + model.latent.rope_width
                return LayerCache(jnp.zeros((repeats, batch, 1, width, length), self.dtype), None)
            shape = (repeats, batch, model.num_kv_heads // parts)
            keys, values = (
                jnp.zeros((*shape, *size), self.dtype)
                for size in ((model.head_width, length), (length, model.head_width))
            )
            return LayerCache(keys, values)

        return [
            [layer(repeats) for _ in kinds]
            for kinds, repeats in stack_layers(layer_kinds(model, self.moe))
        ]

    def grow_cache(self, cache: Cache, length: int) -> Cache:
        """The same cache with room for `length` tokens."""

        def pad(a: jax.Array, dim: int) -> jax.Array:
            widths = [(0, length - size if d == dim else 0) for d, size in enumerate(a.shape)]
            return jax.jit(partial(jnp.pad, pad_width=widths), out_shardings=a.sharding)(a)

        return [
            [
                LayerCache(pad(c.keys, 4), None if c.values is None else pad(c.values, 3))
                for c in stack
            ]
            for stack in cache
        ]

    @cached_property
    def _cache_specs(self) -> Cache:
        spec: Any = P(None, "data", self.kv_axes or None, None, None)
        one = LayerCache(spec, None if self.model.latent.kv_rank else spec)
        return [
            [one for _ in kinds] for kinds, _ in stack_layers(layer_kinds(self.model, self.moe))
        ]

    # Compiled functions. `tables` are replicated; a turn's arrays are split over `data`.

    def extend(
        self,
        params: Any,
        tables: LayerTables,
        cache: Cache,
        turn: NewTokens,
        *,
        fresh: bool = False,
    ) -> tuple[jax.Array, Cache]:
        """Logits after each row's last new token, f32 [B, V], and the cache with the new tokens.

        The given cache's memory is used again. `fresh` promises that no row of the cache holds
        tokens: new tokens then look at each other alone, which is quicker. start + S must not
        exceed the cache's length.
        """
        return (self._extend_fresh if fresh else self._extend)(params, tables, cache, turn)

    @cached_property
    def _extend(self):
        return self._compile(fresh=False)

    @cached_property
    def _extend_fresh(self):
        return self._compile(fresh=True)

    def _compile(self, *, fresh: bool):
        in_specs = (self.param_specs, P(), self._cache_specs, NEW_TOKENS_SPEC)
        local = partial(self._local_extend, fresh=fresh)
        sharded = self._shard_map(local, in_specs, (P("data"), self._cache_specs))
        donated = (2,) if platform_of(self.mesh.devices.flat[0]).donates else ()
        return jax.jit(sharded, donate_argnums=donated)

    def _shard_map(self, local: Any, in_specs: Any, out_specs: Any) -> Any:
        """A device alone need not track which values vary: doing so would take a sum with itself, a
        collective.
        """
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=self.mesh.size > 1,
        )

    def _local_extend(
        self, params: Any, tables: LayerTables, cache: Cache, turn: NewTokens, *, fresh: bool
    ) -> tuple[jax.Array, Cache]:
        transformer = nnx.merge(self.graph, params)
        hidden_BSD, cache = transformer.extend(turn, tables, cache, fresh=fresh)
        return self.last_logits(transformer, hidden_BSD, turn), cache

    def last_logits(
        self, transformer: Transformer, hidden_BSD: jax.Array, turn: NewTokens
    ) -> jax.Array:
        """Logits after each row's last new token, f32 [B, V], inside the compiled program."""
        last_B11 = jnp.maximum(turn.length - 1, 0)[:, None, None]
        return self._logits(transformer, jnp.take_along_axis(hidden_BSD, last_B11, axis=1)[:, 0])

    def _logits(self, transformer: Transformer, hidden_TD: jax.Array) -> jax.Array:
        """Logits over the whole vocabulary, f32 [T, V], on every device."""
        split = axes_of(transformer.head_parameter, "vocab")
        logits_TV = logits(hidden_TD, transformer.head_weights())
        if split and lax.axis_size(split) > 1:
            return lax.all_gather(logits_TV, split, axis=1, tiled=True, to="invarying")
        return psum(logits_TV, split)

    def _local_hidden(
        self, params: Any, tables: LayerTables, turn: NewTokens
    ) -> tuple[Transformer, jax.Array]:
        """Final hidden states of whole sequences, through a cache that is thrown away."""
        transformer = nnx.merge(self.graph, params)
        parts = lax.axis_size(self.kv_axes) if self.kv_axes else 1
        batch, length = turn.tokens.shape
        empty = self._zeros(batch, length, parts)
        empty = jax.tree.map(lambda a: lax.pcast(a, ("data", *self.kv_axes), to="varying"), empty)
        return transformer, transformer.extend(turn, tables, empty, fresh=True)[0]

    @cached_property
    def all_logits(self):
        """(params, tables, turn) -> f32 [B, S, V], logits at every position of new sequences; those
        of padding mean nothing.
        """

        def local(params: Any, tables: LayerTables, turn: NewTokens) -> jax.Array:
            transformer, hidden_BSD = self._local_hidden(params, tables, turn)
            return self._logits(transformer, hidden_BSD.reshape(-1, hidden_BSD.shape[-1])).reshape(
                *hidden_BSD.shape[:2], -1
            )

        return jax.jit(self._shard_map(local, (self.param_specs, P(), NEW_TOKENS_SPEC), P("data")))

    @cached_property
    def _score(self):
        def local(
            params: Any,
            tables: LayerTables,
            turn: NewTokens,
            targets_BS: jax.Array,
            mask_BS: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            return self.nats(*self._local_hidden(params, tables, turn), targets_BS, mask_BS)

        in_specs = (self.param_specs, P(), NEW_TOKENS_SPEC, P("data"), P("data"))
        return jax.jit(self._shard_map(local, in_specs, P()))

    def nats(
        self,
        transformer: Transformer,
        hidden_BSD: jax.Array,
        targets_BS: jax.Array,
        mask_BS: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """What `score` gives, inside the compiled program."""
        split = axes_of(transformer.head_parameter, "vocab")
        hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        args = (hidden_TD, transformer.head_weights(), targets_BS.reshape(-1), mask_BS.reshape(-1))
        axis = split if split and lax.axis_size(split) > 1 else None
        nats = linear_cross_entropy(*args, axis=axis)
        if axis is None:
            nats = psum(nats, split)  # over one device, for its type alone
        return psum(nats, ("data",)), psum(jnp.sum(mask_BS), ("data",))

    def score(
        self, params: Any, tables: LayerTables, tokens_BS: Any, targets_BS: Any, mask_BS: Any
    ) -> tuple[float, float]:
        """Sum of the negative log-likelihoods, nats, of targets where `mask_BS` is 1, and their
        number. B a multiple of `data`.

        Raises UserError for tokens that the model does not have.
        """
        tokens_BS = np.asarray(tokens_BS, np.int32)
        self.check_tokens(int(max(np.max(tokens_BS, initial=0), np.max(targets_BS, initial=0))))
        rows, length = tokens_BS.shape
        start_B, length_B = np.zeros(rows, np.int32), np.full(rows, length, np.int32)
        turn = NewTokens(*map(jnp.asarray, (tokens_BS, start_B, length_B)))
        nats, count = self._score(
            params, tables, turn, np.asarray(targets_BS, np.int32), np.asarray(mask_BS, np.float32)
        )
        return float(nats), float(count)


def _check_mesh(model: ModelConfig, moe: MoEConfig, mesh: Mesh | AbstractMesh) -> None:
    """Refuses a tensor axis that does not divide what it must."""
    tensor = mesh.shape["tensor"]
    wanted = [
        ("query heads", model.num_heads),
        ("key and value heads", model.num_kv_heads),
        ("expert hidden width", moe.hidden),
    ]
    for what, size in wanted if any(kind.moe for kind in layer_kinds(model, moe)) else wanted[:2]:
        if size % tensor:
            raise UserError(
                f"--mesh tensor={tensor} does not divide the model's {size} {what}: choose a "
                f"divisor."
            )
