"""The model that a configuration describes, a language model or a forecaster of series, and the
tree of its parameters as a table, read from the abstract model: what each array is and which
layers it belongs to.

    for parameter in parameters(model, moe, vocab_size).values():
        parameter.path.text, parameter.axes, parameter.shape, parameter.layers

Nothing about the tree is written a second time: names and shapes are those of the modules, and the
logical axes those that each `param(...)` names (see parallel/sharding.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import NamedTuple

from flax import nnx

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.models.batch import AnyBatch, Batch, SeriesBatch
from moe_jax.models.chronos.mixture import ChronosMixture
from moe_jax.models.layer_pattern import layer_kinds, stack_layers
from moe_jax.models.paths import ParameterPath
from moe_jax.models.transformer import Transformer

PARAMETER_KINDS = (
    "embedding",
    "attention",
    "dense feed-forward",
    "experts",
    "shared experts",
    "routers",
    "norms",
    "head",
)


# Tokens of a forecaster that are no patches: the decoder's first, and REG.
FORECASTER_TOKENS = 2


def make_model(
    model: ModelConfig, moe: MoEConfig, vocab_size: int, *, rngs: nnx.Rngs
) -> Transformer | ChronosMixture:
    """The model with experts in logical order; a forecaster has no vocabulary."""
    if model.forecasts:
        return ChronosMixture(model, moe, rngs=rngs)
    return Transformer(model, moe, vocab_size, rngs=rngs)


def batch_type(model: ModelConfig) -> type[AnyBatch]:
    """What goes through it in training."""
    return SeriesBatch if model.forecasts else Batch


class Parameter(NamedTuple):
    """One array of the tree: stacked over `layers`, or one of the whole model (no layers)."""

    path: ParameterPath
    axes: tuple[str, ...]  # the logical name of each dim, without the layers'
    shape: tuple[int, ...]  # of the same dims; experts are in logical order, one slot each
    layers: tuple[int, ...] | None  # the number of each layer in the model

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The shape in the tree, layers first where it has any."""
        return self.shape if self.layers is None else (len(self.layers), *self.shape)

    @property
    def size(self) -> int:
        """How many numbers it has, in all layers."""
        return math.prod(self.stacked_shape)

    def active_size(self, moe: MoEConfig) -> int:
        """Those that one token uses: of the experts, `top_k`."""
        return self.size // moe.num_experts * moe.top_k if self.path.is_expert else self.size


@functools.lru_cache(maxsize=16)
def parameters(
    model: ModelConfig, moe: MoEConfig, vocab_size: int
) -> MappingProxyType[str, Parameter]:
    """Every parameter by its path, such as `stacks/0/blocks/1/mlp/experts/gate_up`, in tree
    order.
    """
    abstract = nnx.eval_shape(lambda: make_model(model, moe, vocab_size, rngs=nnx.Rngs(0)))
    layers_of = _layers_of_blocks(model, moe)
    table = {}
    for keys, variable in nnx.to_flat_state(nnx.state(abstract)):
        path = ParameterPath.parse("/".join(map(str, keys)))
        axes, shape = variable.get_metadata("axes"), variable.get_value().shape
        layers = None if path.stack is None else layers_of[path.layer_block]
        shape = shape if layers is None else shape[1:]
        assert len(axes) == len(shape), path.text
        table[path.text] = Parameter(path, axes, shape, layers)
    return MappingProxyType(table)


def _layers_of_blocks(model: ModelConfig, moe: MoEConfig) -> dict[tuple[int, int], tuple[int, ...]]:
    """For block j of stack i, the number of each of its repeats among all layers."""
    layers_of, start = {}, 0
    for i, (kinds, repeats) in enumerate(stack_layers(layer_kinds(model, moe))):
        end = start + len(kinds) * repeats
        for j in range(len(kinds)):
            layers_of[i, j] = tuple(range(start + j, end, len(kinds)))
        start = end
    return layers_of


def kind_of(path: str) -> str:
    """Which of `PARAMETER_KINDS` a path of the tree is."""
    if path in ("embedding", "head"):
        return path
    if path == "ends/shared":  # the tokens of a forecaster
        return "embedding"
    parsed = ParameterPath.parse(path)
    if parsed.name == "scale":
        return "norms"
    kinds = {
        "attention/": "attention",
        "cross/": "attention",
        "encoder_bias/": "attention",
        "decoder_bias/": "attention",
        "mlp/router/": "routers",
        "router/": "routers",
        "mlp/experts/": "experts",
        "mlp/shared_": "shared experts",
    }
    return next(
        (kind for start, kind in kinds.items() if parsed.within.startswith(start)),
        "dense feed-forward",
    )


def by_kind(paths: Iterable[str], count: Callable[[str], int]) -> dict[str, int]:
    """Sums of `count(path)` over the parameters of each kind, for the kinds that there are."""
    totals = dict.fromkeys(PARAMETER_KINDS, 0)
    for path in paths:
        totals[kind_of(path)] += count(path)
    return {kind: total for kind, total in totals.items() if total}
