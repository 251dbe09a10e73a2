"""What a family of models is to this package: a config mapping and a name table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.hf.config_keys import Keys
from moe_jax.hf.tensor_names import Names


class Family(NamedTuple):
    """One `model_type` of config.json; docs/adding_a_model.md shows how to write one."""

    model_type: str
    architecture: str
    """The class in transformers, for `architectures` of a config.json that we write."""
    read: Callable[[Keys], tuple[ModelConfig, MoEConfig]]
    """Takes every key that it honours; of those left, what is not off is refused."""
    names: Callable[[dict[str, Any]], Names]
    """The tensors of the parameters, given the whole config."""
    unused: Callable[[dict[str, Any]], str] = lambda config: r"$^"
    """A pattern of further tensor names that a checkpoint may hold and the model does not need."""
    fused: Names | None = None
    """What takes the place of `names` in a checkpoint whose experts are one tensor per layer, which
    transformers 5 writes on request; None where there is one form alone.
    """
