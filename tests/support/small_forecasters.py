"""Small forecasters with experts, for tests: programs that train them, and models in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax.config.model import ForecastConfig, ModelConfig, MoEConfig
from moe_jax.config.schema import MeshConfig, OptimizerConfig
from moe_jax.forecasting.bolt import BoltForecaster
from moe_jax.forecasting.mixture import mixture_forecaster
from moe_jax.forecasting.placed_model import place
from moe_jax.models.chronos.config import bolt_config
from moe_jax.models.chronos.mixture import ChronosMixture
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous
from moe_jax.training.step import TrainProgram

CONTEXT, HORIZON, EXPERTS, TOP_K, BATCH, LAYERS = 16, 8, 8, 2, 16, 2
MODEL = ModelConfig(
    num_layers=1,
    width=16,
    num_heads=2,
    hidden=16,
    forecast=ForecastConfig(
        patch=4, decoder_layers=LAYERS, context_length=CONTEXT, prediction_length=HORIZON
    ),
)
MOE: dict[str, Any] = dict(
    num_experts=EXPERTS, top_k=TOP_K, hidden=8, route_by="sequence", dropless=True
)


def make_program(
    data: int = 1,
    expert: int = 1,
    tensor: int = 1,
    *,
    redundant: int = 0,
    accumulation: int = 1,
    model: ModelConfig = MODEL,
    **moe: Any,
) -> TrainProgram:
    config = MoEConfig(**MOE | moe)
    return TrainProgram(
        model,
        config,
        OptimizerConfig(warmup_steps=0, learning_rate=0.01),
        make_mesh(MeshConfig(data=data, expert=expert, tensor=tensor)),
        contiguous(count_moe_layers(model, config), EXPERTS, expert, redundant),
        vocab_size=2,
        steps=100,
        accumulation=accumulation,
    )


def make_windows(seed: int = 0, rows: int = BATCH) -> dict[str, np.ndarray]:
    """Walks of different levels and sizes, with a beginning that is not there, gaps, and a target
    that is not all known.
    """
    rng = np.random.default_rng(seed)
    walks = rng.standard_normal((rows, CONTEXT + HORIZON)).cumsum(axis=1)
    walks = rng.lognormal(size=(rows, 1)) * walks + 10 * rng.standard_normal((rows, 1))
    context, target = np.split(walks.astype(np.float32), [CONTEXT], axis=1)
    context[1, :9], context[2, 5:7], target[3, 5:] = np.nan, np.nan, np.nan
    return {"context": context, "target": target}


class InMemory:
    """A model of random weights, as `place` takes it."""

    folder = Path("memory")

    def __init__(self, model: ModelConfig = MODEL, **moe: Any):
        def make() -> ChronosMixture:
            return ChronosMixture(model, MoEConfig(**MOE | moe), rngs=nnx.Rngs(0))

        self.config, self.abstract = bolt_config(model), nnx.eval_shape(make)
        self.arrays = {
            "/".join(map(str, keys)): np.array(variable.get_value())
            for keys, variable in nnx.to_flat_state(nnx.state(make()))
        }

    def leaf(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.arrays[path][index]


def make_forecaster(model: InMemory | None = None, **mesh: int) -> BoltForecaster:
    config, model = MeshConfig(**mesh), model or InMemory()
    placed = place(model, make_mesh(config, jax.devices()[: config.size]))
    return mixture_forecaster(model.config, placed)
