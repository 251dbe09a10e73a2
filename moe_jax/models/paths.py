"""The path of an array in a model's tree of parameters, such as
`stacks/0/blocks/1/mlp/experts/down`.

    path = ParameterPath.parse("opt_state/0/mu/stacks/0/blocks/1/mlp/experts/down")
    path.is_expert, path.stack, path.block, path.name      # True, 0, 1, "down"

The one place that knows how paths look. Moments have their parameter's path behind a prefix of
their own.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
from flax import nnx, traverse_util

_LAYER = re.compile(r"(?:^|/)stacks/(\d+)/blocks/(\d+)/(.+)$")
# Matrices whose first dim (after the slots' in an expert's) is their output, the model's width; the
# first dim of every other matrix is its input.
_OUTPUT_FIRST = ("out", "down", "shared_down")


class ParameterPath(NamedTuple):
    """A parsed path."""

    text: str
    stack: int | None  # None for what is of the whole model
    block: int | None  # which of the stack's pattern of layers
    within: str  # the rest, within its layer, or all of it

    @classmethod
    def parse(cls, path: str) -> ParameterPath:
        """Reads a path of keys with slashes between them; a prefix before `stacks/` is passed
        over.
        """
        match = _LAYER.search(path)
        if match is None:
            return cls(path, None, None, path)
        return cls(path, int(match[1]), int(match[2]), match[3])

    @property
    def name(self) -> str:
        """The last key."""
        return self.within.rsplit("/", 1)[-1]

    @property
    def parameter(self) -> str:
        """The path of the parameter that it is, or that it is a moment of, without what is in
        front. For arrays of layers alone.
        """
        assert self.stack is not None, self.text
        return f"stacks/{self.stack}/blocks/{self.block}/{self.within}"

    @property
    def prefix(self) -> str:
        """What stands before that, such as `opt_state/0/mu/`; empty for a parameter itself."""
        return self.text.removesuffix(self.parameter)

    @property
    def is_expert(self) -> bool:
        """Whether it is an array of routed experts, whose dim after the layers' counts slots."""
        return self.within.startswith("mlp/experts/")

    @property
    def is_router(self) -> bool:
        """Whether it is an array of a router."""
        return self.within.startswith(("mlp/router/", "router/"))

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies: no norm's scale, no bias, no attention sink."""
        return self.name not in ("scale", "sinks") and not self.name.endswith("bias")

    @property
    def dense_counterpart(self) -> str:
        """Where a dense layer has, within it, what this is of each expert; itself for all else."""
        return self.within.replace("mlp/experts/", "mlp/")

    @property
    def is_output_first(self) -> bool:
        """Whether it is a matrix whose outputs come before its inputs."""
        return self.name in _OUTPUT_FIRST

    @property
    def layer_block(self) -> tuple[int, int]:
        """(stack, block), the key of `layer_pattern.expert_layers`. For arrays of layers alone."""
        assert self.stack is not None and self.block is not None, self.text
        return self.stack, self.block


def path_of(keys: tuple[Any, ...]) -> ParameterPath:
    """The path of a leaf from the keys that `jax.tree.leaves_with_path` gives."""
    return ParameterPath.parse(jax.tree_util.keystr(keys, simple=True, separator="/"))


def by_path(tree: Any) -> dict[str, Any]:
    """The arrays of a tree of parameters by the text of their paths."""
    return {path_of(keys).text: leaf for keys, leaf in jax.tree.leaves_with_path(tree)}


def nested(values: dict[str, Any]) -> Any:
    """The tree of parameters, nested dicts as the model takes them, from values by path."""
    return nnx.restore_int_paths(traverse_util.unflatten_dict(values, sep="/"))
