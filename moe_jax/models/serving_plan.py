"""How a model's weights lie on a mesh for inference; no array is made.

plan = ServingPlan(model, moe, mesh, placement, vocab_size=32_000, dtype="bfloat16")
plan.weights["head"].held_spec()                # how each parameter is held
params = plan.pack(training_params)             # weights that an engine takes

Weights are held as packed weights (ops/quantized.py), each device its part, and nothing is
gathered: attention heads, hidden and vocabulary dims are split over `tensor` and, where they
divide, over `expert` too; experts over `expert`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.errors import UserError
from moe_jax.models.layer_pattern import layer_kinds, routes_by_sequence
from moe_jax.models.paths import ParameterPath, by_path, nested
from moe_jax.models.transformer import Transformer
from moe_jax.models.weight_layout import WeightPlan, bytes_of, cut_banks, plan_weight
from moe_jax.ops.quantized import Kind
from moe_jax.parallel.sharding import apply_rules, named, serving_rules, specs
from moe_jax.placement.table import Placement


class ServingPlan:
    """A model on a mesh before its weights are there. The mesh may be abstract."""

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
        cuts_banks: bool = False,
    ):
        """`dtype` is that of weights, activations and cache; with int4, `group` inputs share a
        scale. With `cuts_banks` the experts of many layers are several arrays (`cut_banks`).

        Raises UserError where the mesh does not divide the model.
        """
        compute: dict[str, Any] = {"compute_dtype": dtype}
        self.model = dataclasses.replace(model, **compute)
        self.moe, self.mesh, self.placement, self.vocab_size = moe, mesh, placement, vocab_size
        self.dtype, self.quantization = jnp.dtype(dtype), quantization
        _check_generates(model, moe)
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
            shares_kv=not (model.qk_norm and model.qk_norm_over == "width"),
        )
        apply_rules(abstract, rules)
        self.rules = rules
        """Mesh axes over which each kind of dims is split."""
        self.kv_axes = () if model.latent.kv_rank else rules["cache_heads"]
        """Mesh axes over which the cache's heads are split."""
        parts = math.prod(mesh.shape[axis] for axis in self.kv_axes)
        self.cache_heads = max(model.num_kv_heads, parts)
        """Heads of the cache: one per device where several share a key head."""
        self.graph, variables = nnx.split(abstract)
        weights = self._plan_weights(variables, quantization, group)
        self.weights = cut_banks(weights) if cuts_banks else weights
        """The plan of each parameter by its path, in the tree's order."""
        held = {path: weight.held_spec() for path, weight in self.weights.items()}
        self.param_specs = nested(held)

    def _plan_weights(self, variables: Any, kind: Kind, group: int) -> dict[str, WeightPlan]:
        plans = {}
        variable_specs = jax.tree.leaves(specs(variables), is_leaf=lambda x: isinstance(x, P))
        flat = nnx.to_flat_state(variables)
        for (keys, variable), spec in zip(flat, variable_specs, strict=True):
            path = ParameterPath.parse("/".join(map(str, keys)))
            names, shape = variable.get_metadata("axes"), variable.get_value().shape
            if path.is_expert:
                shape = (shape[0], self.placement.num_slots, *shape[2:])
            # Dims that are summed over are the last ones, and cut where heads or hidden dims are.
            cut: list[str] = []
            if path.is_output_first:
                cut = [axis for axes in variable.get_metadata("mesh_axes")[-2:] for axis in axes]
            parts = math.prod(self.mesh.shape[axis] for axis in cut)
            plans[path.text] = plan_weight(
                path.text, shape, names, spec, dtype=self.dtype, kind=kind, group=group, parts=parts
            )
        return plans

    def idle_note(self) -> str | None:
        """A sentence on slots that hold no expert; None where all do."""
        ranks, experts = self.mesh.shape["expert"], self.moe.num_experts
        if ranks > experts and self.placement.empty_slots:
            return (
                f"{ranks - experts} of the {ranks} devices along expert hold no expert: a layer "
                f"has {experts}."
            )
        if self.placement.empty_slots:
            return (
                f"{self.placement.empty_slots} slots per layer stay empty, as the expert axis "
                f"does not divide {experts} experts."
            )
        return None

    def abstract_params(self) -> Any:
        """Shapes, dtypes and shardings of the weights, as `pack` gives them."""

        def placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

        shapes = nested({path: weight.abstract() for path, weight in self.weights.items()})
        return jax.tree.map(placed, shapes, named(self.mesh, self.param_specs))

    def pack(self, params: Any, *, consume: bool = False) -> Any:
        """Weights to serve from training parameters with experts in the plan's slots.

        With `consume` the parameters are deleted, one after another, so that both are never in
        memory whole.
        """
        values, packed = by_path(params), {}
        for path, weight in self.weights.items():

            def pack(a: jax.Array, weight: WeightPlan = weight) -> Any:
                return weight.pack(a if weight.order is None else a.transpose(weight.order))

            held = named(self.mesh, weight.held_spec())
            packed[path] = jax.block_until_ready(jax.jit(pack, out_shardings=held)(values[path]))
            if consume:
                values[path].delete()
        return nested(packed)

    def decode_bytes(self, batch: int) -> int:
        """Bytes of weights that a decode step of `batch` rows must read, over all devices, each
        part of them once.

        With several rows it counts the experts that even, independent choices would touch on
        average.
        """
        return round(
            sum(bytes_of(w) * self.read_part(path, batch) for path, w in self.weights.items())
        )

    def read_part(self, path: str, batch: int) -> float:
        """The part of a parameter that `decode_bytes` counts."""
        if path == "embedding" and not self.model.tied_embeddings:
            return batch / self.vocab_size  # rows of it alone
        if not ParameterPath.parse(path).is_expert:
            return 1.0
        experts, top_k = self.moe.num_experts, self.moe.top_k
        touched = experts * (1 - (1 - top_k / experts) ** batch)
        return touched / self.placement.num_slots

    def expert_bytes(self) -> int:
        """Bytes of all routed experts' weights, each slot once."""
        return sum(
            bytes_of(weight)
            for path, weight in self.weights.items()
            if ParameterPath.parse(path).is_expert
        )

    @property
    def held_in(self) -> str:
        """The types of its weights, in words."""
        kind, dtype = self.quantization, self.dtype.name
        return dtype if kind == "float" else f"{kind} and {dtype}"

    def check_tokens(self, largest: int) -> None:
        """Raises UserError for tokens that the model has no row for, which would read as zeros."""
        if largest >= self.vocab_size:
            raise UserError(
                f"The text has token {largest} and the model a vocabulary of {self.vocab_size}: "
                f"its tokenizer is another model's."
            )


def _check_generates(model: ModelConfig, moe: MoEConfig) -> None:
    """Refuses forecasters, and experts that are chosen by tokens which are still to come."""
    if model.forecasts:
        raise UserError(
            "This model forecasts series and writes no text: use moe-jax forecast or moe-jax "
            "eval-forecast."
        )
    if routes_by_sequence(model, moe):
        raise UserError(
            "moe.route_by=sequence routes a sequence by the mean of all its tokens, which a model "
            "does not know while it reads and writes them one after another: such a model can be "
            "trained and validated; train with moe.route_by=token to generate."
        )


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
