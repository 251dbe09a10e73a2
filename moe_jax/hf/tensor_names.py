"""From leaves of the parameter tree to tensors of a file: what a family's name table says, and what
follows from it.

A table gives, for each leaf of a block (and the few of the whole model), the name of its tensor.
Most are Linear weights [outputs, inputs], whose dimensions follow from ours (`leaves.file_dims`),
so that a table is nearly pure names:

    "attention/query": "self_attn.q_proj.weight"                        one tensor
    "mlp/gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight")       gate and up apart
    "mlp/experts/down": "mlp.experts.{expert}.down_proj.weight"         each expert apart
    "mlp/experts/gate_up": Stored("mlp.experts.gate_up_proj", "P D (I C)")   a layout of its own
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.models.parameters import Dims, Leaf

# Matrices whose first dimension is their output; of all others it is the input.
OUTPUT_FIRST = frozenset(("out", "down", "shared_down"))


def file_dims(leaf: Leaf, apart: str) -> tuple[Dims, ...]:
    """How a Linear layer stores a leaf: outputs, then inputs, each merged into one dimension.

    The dimensions in `apart` (C, P) are not in the tensor, as each of their entries has one of its
    own.
    """
    dims = tuple(dim for dim in leaf.dims if dim not in apart)
    last = leaf.name.rsplit("/", 1)[-1]
    if last in ("scale", "sinks", "bias") or last.endswith("_bias"):
        return (dims,)
    return (dims[:1], dims[1:]) if last in OUTPUT_FIRST else (dims[1:], dims[:1])


def parse_dims(layout: str) -> tuple[Dims, ...]:
    """`P D (I C)` as a tensor's dimensions, of which brackets merge several into one."""
    return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", layout))


LAYER_PREFIX = "model.layers.{layer}."
# The selection bias of DeepSeek-V3's routers is no parameter: it lives with the tables that routing
# needs.
SELECTION_BIAS = "selection_bias"


class Stored(NamedTuple):
    """How a leaf is stored."""

    name: (
        str | tuple[str, str]
    )  # of its tensor, or of two that hold gate and up; with {expert}, of each expert's
    layout: str = (
        ""  # the tensor's dimensions, brackets for merged ones; empty: those of a Linear layer
    )
    # rotated pairs at the end of our last dimension are neighbours, where ours are half a head
    # apart
    interleaved: bool = False
    mxfp4: bool = (
        False  # as NAME_blocks and NAME_scales, quantised along the tensor's last dimension
    )


Names = dict[str, Stored | str | tuple[str, str]]

TOP: Names = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm/scale": "model.norm.weight",
}
ATTENTION: Names = {
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "attention/query": "self_attn.q_proj.weight",
    "attention/key": "self_attn.k_proj.weight",
    "attention/value": "self_attn.v_proj.weight",
    "attention/out": "self_attn.o_proj.weight",
    "attention/query_bias": "self_attn.q_proj.bias",
    "attention/key_bias": "self_attn.k_proj.bias",
    "attention/value_bias": "self_attn.v_proj.bias",
    "attention/out_bias": "self_attn.o_proj.bias",
}
HEAD_NORMS: Names = {
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
}
FEED_FORWARD: Names = {
    "mlp/gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp/down": "mlp.down_proj.weight",
    "mlp/gate_up_bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "mlp/down_bias": "mlp.down_proj.bias",
}
EXPERTS: Names = {
    "mlp/router/weight": "mlp.gate.weight",
    "mlp/experts/gate_up": (
        "mlp.experts.{expert}.gate_proj.weight",
        "mlp.experts.{expert}.up_proj.weight",
    ),
    "mlp/experts/down": "mlp.experts.{expert}.down_proj.weight",
}


class TensorPlan(NamedTuple):
    """A leaf and its tensors."""

    leaf: Leaf
    stored: Stored
    names: tuple[str, ...]  # one, or one for gate and one for up
    dims: tuple[Dims, ...]  # of each tensor, merged groups

    @property
    def by_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{expert}" in self.names[0]

    @property
    def by_half(self) -> bool:
        """Whether gate and up have a tensor each."""
        return len(self.names) == 2

    def tensor(self, layer: int | None, expert: int | None, half: int | None) -> str:
        """The name of the tensor of one layer that holds an expert's gate (0) or up (1), where
        these are apart.
        """
        prefix = "" if layer is None else LAYER_PREFIX
        return (prefix + self.names[half if half and self.by_half else 0]).format(
            layer=layer, expert=expert
        )

    def tensors(self, experts: int) -> Iterator[str]:
        """The names of all tensors of the leaf, in a model with this many experts."""
        for layer in self.leaf.layers or (None,):
            for expert in range(experts if self.by_expert else 1):
                for half in range(len(self.names)):
                    yield self.tensor(layer, expert, half)

    def shape(self, size: dict[str, int]) -> tuple[int, ...]:
        """The shape of each tensor, as if it were not quantised."""
        return tuple(math.prod(size[dim] for dim in group) for group in self.dims)


def plan_tensors(leaf: Leaf, names: Names) -> TensorPlan | None:
    """How a family stores a leaf; None where its table has no place for it."""
    entry = names.get(leaf.name)
    if entry is None:
        return None
    stored = entry if isinstance(entry, Stored) else Stored(entry)
    tensors = (stored.name,) if isinstance(stored.name, str) else stored.name
    apart = ("P" if "{expert}" in tensors[0] else "") + ("C" if len(tensors) == 2 else "")
    return TensorPlan(
        leaf,
        stored,
        tensors,
        parse_dims(stored.layout) if stored.layout else file_dims(leaf, apart),
    )
