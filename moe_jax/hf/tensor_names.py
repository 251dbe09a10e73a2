"""From our parameters to tensors of a file: what a family's name table says, and what follows from
it.

A table gives, for each parameter of a layer (and the few of the whole model), the name of its
tensor. Most are Linear weights [outputs, inputs], whose dims follow from ours (`linear_axes`), so
that a table is nearly pure names:

    "attention/query": "self_attn.q_proj.weight"                        one tensor
    "mlp/gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight")       gate and up apart
    "mlp/experts/down": "mlp.experts.{expert}.down_proj.weight"         each expert apart
    "mlp/experts/down": Stored("mlp.experts.down_proj", "slots expert_hidden slot_width")
                                                                        a layout of its own
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.models.parameters import Parameter

Axes = tuple[str, ...]  # logical names of dims
EXPERT_AXIS, HALF_AXIS = "slots", "gate_up"  # of an expert's number, and of gate (0) and up (1)


def linear_axes(parameter: Parameter, apart: Axes) -> tuple[Axes, ...]:
    """How a Linear layer stores a parameter: outputs, then inputs, each merged into one dim.

    The axes in `apart` are not in the tensor, as each of their entries has a tensor of its own.
    """
    axes = tuple(axis for axis in parameter.axes if axis not in apart)
    if not parameter.path.is_matrix:
        return (axes,)
    outputs_first = parameter.path.is_output_first
    return (axes[:1], axes[1:]) if outputs_first else (axes[1:], axes[:1])


def parse_layout(layout: str) -> tuple[Axes, ...]:
    """`slots slot_width (expert_hidden gate_up)` as a tensor's dims, of which brackets merge
    several into one.
    """
    return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", layout))


LAYER_PREFIX = "model.layers.{layer}."
# The selection bias of DeepSeek-V3's routers is no parameter: it lives with the tables that routing
# needs.
SELECTION_BIAS = "selection_bias"


class Stored(NamedTuple):
    """How a parameter is stored."""

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

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOP: Names = {
    "embedding": EMBEDDING,
    "head": HEAD,
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
# As transformers 5 holds them, and saves them on request: all experts of a layer as one tensor.
FUSED_GATE_UP = "mlp.experts.gate_up_proj"
FUSED_EXPERTS: Names = {
    "mlp/experts/gate_up": Stored(FUSED_GATE_UP, "slots (gate_up expert_hidden) slot_width"),
    "mlp/experts/down": Stored("mlp.experts.down_proj", "slots slot_width expert_hidden"),
}


class TensorPlan(NamedTuple):
    """A parameter and its tensors."""

    parameter: Parameter
    stored: Stored
    names: tuple[str, ...]  # one, or one for gate and one for up
    groups: tuple[Axes, ...]  # the dims of each tensor, each of one or several of ours

    @property
    def by_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{expert}" in self.names[0]

    @property
    def by_half(self) -> bool:
        """Whether gate and up have a tensor each."""
        return len(self.names) == 2

    @property
    def axes(self) -> Axes:
        """The dims of each tensor in the order of the file, none merged."""
        return tuple(axis for group in self.groups for axis in group)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dim of the parameter."""
        return dict(zip(self.parameter.axes, self.parameter.shape, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each tensor, as if it were not quantised."""
        sizes = self.sizes
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups)

    def tensor(self, layer: int | None, expert: int | None, half: int | None) -> str:
        """The name of the tensor of one layer that holds an expert's gate (0) or up (1), where
        these are apart.
        """
        name = self.names[half if half and self.by_half else 0]
        prefix = "" if layer is None or "{layer}" in name else LAYER_PREFIX
        return (prefix + name).format(layer=layer, expert=expert)

    def tensors(self) -> Iterator[str]:
        """The names of all tensors of the parameter."""
        for layer in self.parameter.layers or (None,):
            for expert in range(self.sizes[EXPERT_AXIS] if self.by_expert else 1):
                for half in range(len(self.names)):
                    yield self.tensor(layer, expert, half)


def plan_tensors(parameter: Parameter, names: Names) -> TensorPlan | None:
    """How a family stores a parameter; None where its table has no place for it."""
    entry = names.get(parameter.path.within)
    if entry is None:
        return None
    stored = entry if isinstance(entry, Stored) else Stored(entry)
    tensors = (stored.name,) if isinstance(stored.name, str) else stored.name
    apart = (EXPERT_AXIS,) * ("{expert}" in tensors[0]) + (HALF_AXIS,) * (len(tensors) == 2)
    return TensorPlan(
        parameter,
        stored,
        tensors,
        parse_layout(stored.layout) if stored.layout else linear_axes(parameter, apart),
    )
