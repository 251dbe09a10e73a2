"""A dense Chronos-Bolt folder as a new run whose decoder has experts: copies of its feed-forward
parts, whose weights sum to 1, so that the run's first forecast is the folder's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_jax.config.model import ForecastConfig, ModelConfig
from moe_jax.errors import UserError
from moe_jax.hf.chronos import ChronosCheckpoint, open_chronos
from moe_jax.models.chronos.config import ChronosBoltConfig, bolt_config
from moe_jax.models.parameters import Parameter

# Where Chronos-Bolt has what is beside the layers.
_ENDS = {
    "encoder_bias/table": "encoder/relative/table",
    "decoder_bias/table": "decoder/relative/table",
    "encoder_norm/scale": "encoder/norm/scale",
    "decoder_norm/scale": "decoder/norm/scale",
}
# And the feed-forward part that becomes each expert.
_DENSE = {"mlp/experts/gate_up": "mlp/up", "mlp/experts/down": "mlp/down"}


def open_bolt(folder: Path) -> tuple[ChronosCheckpoint, ModelConfig]:
    """An open checkpoint, and our settings of its model. Raises UserError for another family, and
    for what our forecasters do not have.
    """
    checkpoint = open_chronos(folder)
    theirs = checkpoint.config
    if not isinstance(theirs, ChronosBoltConfig):
        raise UserError(f"{folder} is no Chronos-Bolt: experts are made of that family alone.")
    stack = theirs.stack
    model = ModelConfig(
        num_layers=stack.num_layers,
        width=stack.width,
        num_heads=stack.num_heads,
        head_dim=stack.head_width,
        hidden=stack.hidden,
        norm_eps=stack.norm_eps,
        forecast=ForecastConfig(
            patch=theirs.patch,
            decoder_layers=stack.num_decoder_layers,
            context_length=theirs.context_length,
            prediction_length=theirs.prediction_length,
            quantiles=theirs.quantiles,
        ),
    )
    ours = bolt_config(model)
    ours = ours._replace(stack=ours.stack._replace(init_factor=stack.init_factor))
    for name, value in (*theirs._asdict().items(), *stack._asdict().items()):
        has = getattr(ours, name, getattr(ours.stack, name, None))
        if name != "stack" and has != value:
            raise UserError(
                f"{folder}: {name}={value} in its config.json, where forecasters of ours have "
                f"{has}: choose another checkpoint."
            )
    return checkpoint, model


def bolt_leaf(
    checkpoint: ChronosCheckpoint, model: ModelConfig, parameter: Parameter, experts: int
) -> np.ndarray:
    """A parameter of ours that is no router's, f32, from the folder; experts are all alike."""
    path, layers = parameter.path, parameter.layers
    if layers is None:
        return _whole(checkpoint, _ENDS.get(path.text, path.text))
    decodes = layers[0] >= model.num_layers
    within = _DENSE.get(path.within, path.within)
    array = _whole(checkpoint, f"{'decoder' if decodes else 'encoder'}/blocks/{within}")
    array = array[[layer - model.num_layers * decodes for layer in layers]]
    if path.is_expert:  # [layers, slots, ...], and the up-projection alone where a gate would be
        shape = (len(layers), 1, *parameter.shape[1:])
        array = np.repeat(array.reshape(shape), experts, axis=1)
    return np.ascontiguousarray(array)


def _whole(checkpoint: ChronosCheckpoint, path: str) -> np.ndarray:
    parameter = checkpoint.plans[path].parameter
    return checkpoint.leaf(path, tuple(slice(None) for _ in parameter.stacked_shape))
