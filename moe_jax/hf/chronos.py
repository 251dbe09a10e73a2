"""Folders of Chronos checkpoints: config.json to the model's settings, and safetensors to its
parameters, of which any part is read by byte ranges.

    checkpoint = open_chronos(folder)       # headers only; raises UserError if anything is amiss
    checkpoint.leaf("encoder/blocks/mlp/up", index)

All three families call themselves `t5`: `chronos_config` says that a folder is one of these, and
`architectures` which.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.hf.chronos_config import read_chronos_config
from moe_jax.hf.safetensors import FILE_DTYPES, Shards
from moe_jax.hf.tensor_names import Names, Stored, TensorPlan, plan_tensors
from moe_jax.models.chronos.bolt import ChronosBolt
from moe_jax.models.chronos.chronos2 import Chronos2
from moe_jax.models.chronos.config import (
    Chronos2Config,
    ChronosBoltConfig,
    ChronosConfig,
    ChronosT5Config,
)
from moe_jax.models.chronos.t5 import ChronosT5
from moe_jax.models.parameters import Parameter
from moe_jax.models.paths import ParameterPath

_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}
SHARED_TABLE = "shared.weight"
_SHARED = ("shared", "ends/shared")  # where ours has it; of Chronos-Bolt with both its ends
_TIED = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def _attention(ours: str, stack: str, number: int, name: str, norm: str) -> Names:
    """The tensors of an attention, which is layer `number` of a block, and of its norm."""
    layer = f"{stack}.block.{{layer}}.layer.{number}"
    names: Names = {
        f"{ours}/{key}": f"{layer}.{name}.{value}.weight" for key, value in _PROJECTIONS.items()
    }
    return names | {f"{norm}/scale": f"{layer}.layer_norm.weight"}


def _feed_forward(blocks: str, stack: str, number: int, name: str) -> Names:
    layer = f"{stack}.block.{{layer}}.layer.{number}"
    return {
        f"{blocks}/mlp/up": f"{layer}.{name}.wi.weight",
        f"{blocks}/mlp/down": f"{layer}.{name}.wo.weight",
        f"{blocks}/mlp_norm/scale": f"{layer}.layer_norm.weight",
    }


def _t5_names() -> Names:
    """Of T5's encoder and decoder."""
    names: Names = {"shared": SHARED_TABLE}
    for stack in ("encoder", "decoder"):
        blocks, attention = f"{stack}/blocks", "SelfAttention"
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names |= {
            f"{stack}/relative/table": Stored(bias, "buckets heads"),
            f"{stack}/norm/scale": f"{stack}.final_layer_norm.weight",
        }
        norm = f"{blocks}/attention_norm"
        names |= _attention(f"{blocks}/attention", stack, 0, attention, norm)
        if stack == "decoder":
            norm = f"{blocks}/cross_norm"
            names |= _attention(f"{blocks}/cross", stack, 1, "EncDecAttention", norm)
        names |= _feed_forward(blocks, stack, 1 + (stack == "decoder"), "DenseReluDense")
    return names


def _chronos2_names() -> Names:
    """Of Chronos-2's encoder."""
    blocks = "encoder/blocks"
    names: Names = {"shared": SHARED_TABLE, "encoder/norm/scale": "encoder.final_layer_norm.weight"}
    for number, ours in enumerate(("time", "group")):
        where = (f"{blocks}/{ours}", "encoder", number, "self_attention", f"{blocks}/{ours}_norm")
        names |= _attention(*where)
    return names | _feed_forward(blocks, "encoder", 2, "mlp")


def _residual_block(name: str) -> Names:
    """Of a block that embeds patches or makes quantiles."""
    names: Names = {}
    for key, theirs in {"hidden": "hidden", "out": "output", "residual": "residual"}.items():
        names[f"{name}/{key}"] = f"{name}_embedding.{theirs}_layer.weight"
        names[f"{name}/{key}_bias"] = f"{name}_embedding.{theirs}_layer.bias"
    return names


def names_of(config: ChronosConfig) -> Names:
    """The tensors of a family's parameters, by path."""
    if isinstance(config, ChronosT5Config):
        return _t5_names()
    ends = _residual_block("input_patch") | _residual_block("output_patch")
    if isinstance(config, Chronos2Config):
        return _chronos2_names() | ends
    stacks = _t5_names()
    ends["shared"] = stacks.pop("shared")
    return stacks | {f"ends/{path}": name for path, name in ends.items()}


def chronos_model(config: ChronosConfig) -> Callable[[], nnx.Module]:
    """Makes the model of a configuration, with weights of no meaning."""
    models = {
        ChronosT5Config: ChronosT5,
        ChronosBoltConfig: ChronosBolt,
        Chronos2Config: Chronos2,
    }
    model: Any = models[type(config)]
    return lambda: model(config, rngs=nnx.Rngs(0))


def open_chronos(folder: Path | str) -> ChronosCheckpoint:
    """Reads the config and all headers, and checks that they agree. Raises UserError, one sentence,
    where they do not.
    """
    folder = Path(folder)
    config = read_chronos_config(folder)
    abstract = nnx.eval_shape(chronos_model(config))
    shards, names = Shards(folder), names_of(config)
    if SHARED_TABLE not in shards.entries:  # transformers writes one copy, not always this one
        there = [name for name in _TIED if name in shards.entries]
        shared = next(path for path in _SHARED if path in names)
        names |= {shared: there[0]} if there else {}
    plans = {}
    for keys, variable in nnx.to_flat_state(nnx.state(abstract)):
        path = ParameterPath.parse("/".join(map(str, keys)))
        axes, shape = variable.get_metadata("axes"), variable.get_value().shape
        stacked = len(shape) > len(axes)
        layers = tuple(range(shape[0])) if stacked else None
        plan = plan_tensors(Parameter(path, axes, shape[stacked:], layers), names)
        assert plan is not None, path.text
        plans[path.text] = plan
    _check(folder, plans, shards)
    return ChronosCheckpoint(folder, config, abstract, plans, shards)


class ChronosCheckpoint:
    """An open checkpoint: `config`, the `abstract` model, and `leaf` for its weights."""

    def __init__(
        self,
        folder: Path,
        config: ChronosConfig,
        abstract: nnx.Module,
        plans: dict[str, TensorPlan],
        shards: Shards,
    ):
        self.folder, self.config, self.abstract = folder, config, abstract
        self.plans, self._shards = plans, shards

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far."""
        return self._shards.bytes_read

    def leaf(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a parameter, f32; `index` has a slice of step 1 for each of its dims, the
        layers' first where it has any.
        """
        plan = self.plans[path]
        layers = plan.parameter.layers
        if layers is None:
            return self._read(plan, None, index)
        return np.stack([self._read(plan, layer, index[1:]) for layer in layers[index[0]]])

    def _read(self, plan: TensorPlan, layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        """A part of one layer's parameter."""
        sizes, cuts = plan.sizes, dict(zip(plan.parameter.axes, index, strict=True))
        box = tuple(slice(*cuts[axis].indices(sizes[axis])[:2]) for axis in plan.axes)
        name, shape = plan.tensor(layer, None, None), tuple(sizes[axis] for axis in plan.axes)
        part = self._shards.read(name, shape, box).astype(np.float32, copy=False)
        return part.transpose([plan.axes.index(axis) for axis in plan.parameter.axes])


def _check(folder: Path, plans: dict[str, TensorPlan], shards: Shards) -> None:
    """Every tensor that the config calls for is there, in its shape and a type that we read, and no
    other.
    """
    shared = next(plans[path] for path in _SHARED if path in plans)
    wanted = {name: plan.shape for plan in plans.values() for name in plan.tensors()}
    if missing := sorted(wanted.keys() - shards.entries.keys()):
        raise UserError(
            f"{folder} lacks {missing[0]} and {len(missing) - 1} more tensors that its config.json "
            f"calls for: download the checkpoint again."
        )
    for name in sorted(shards.entries.keys() - wanted.keys()):
        if name not in _TIED:
            raise UserError(
                f"{folder} holds {name}, which a model of its config.json does not have: take both "
                f"from the same checkpoint."
            )
        if not shards.same(name, shared.names[0]):
            raise UserError(
                f"{folder} has a {name} of its own: only models whose embedding is their head are "
                f"supported, as all public Chronos models are."
            )
    for name, shape in wanted.items():
        entry = shards.entries[name]
        if entry.shape != shape or entry.dtype not in FILE_DTYPES:
            raise UserError(
                f"{folder}: {name} is {entry.dtype} {list(entry.shape)} where config.json calls "
                f"for {list(shape)}: take both from the same checkpoint."
            )
