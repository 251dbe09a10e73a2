"""Forecasters that `moe-jax train` made: runs of Chronos-Bolt's form, with experts or without."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moe_jax.errors import UserError
from moe_jax.forecasting.bolt import BoltForecaster
from moe_jax.forecasting.placed_model import PlacedModel, place
from moe_jax.model_io.source import RunSource
from moe_jax.model_io.weights import Weights
from moe_jax.models.chronos.config import ChronosBoltConfig, bolt_config
from moe_jax.models.chronos.mixture import ChronosMixture
from moe_jax.models.parameters import make_model
from moe_jax.moe.router import Routing


def mixture_forecaster(
    config: ChronosBoltConfig, placed: PlacedModel, bias_LE: np.ndarray | None = None
) -> BoltForecaster:
    """The forecaster of a `ChronosMixture`: beyond one pass a series and all its paths keep the
    route that it got in the first. `bias_LE` is the balance bias of the experts' choice.
    """
    bias = None if bias_LE is None else jnp.asarray(bias_LE)

    def first_pass(model: ChronosMixture, context_BT: jax.Array) -> tuple[jax.Array, Any]:
        forecast_BQH, routing = model.forecast(context_BT, bias)
        return forecast_BQH, () if routing is None else tuple(routing)

    return BoltForecaster(config, placed, first_pass=first_pass, later_pass=_later_pass)


def _later_pass(
    model: ChronosMixture, context_BT: jax.Array, expert_BK: jax.Array, weight_BK: jax.Array
) -> jax.Array:
    return model.forecast_on(context_BT, Routing(expert_BK, weight_BK))


def series_routes(forecaster: BoltForecaster, context_BT: np.ndarray) -> Routing:
    """The route of each series, by its last values. Raises UserError for a model without
    experts.
    """
    _, kept = forecaster.placed.run(forecaster.first_pass, context_BT)
    if not kept:
        raise UserError("This forecaster has no experts: its layers are dense.")
    return Routing(*kept)


class _RunCheckpoint(NamedTuple):
    """A run's model, as `place` takes it."""

    folder: Path
    config: ChronosBoltConfig
    abstract: nnx.Module
    weights: Weights

    def leaf(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a parameter, experts in logical order."""
        return self.weights.leaf(path, index)


def open_run(run: RunSource, mesh: Mesh | None = None) -> BoltForecaster:
    """The forecaster of a run's newest checkpoint. Raises UserError for a language model, and for a
    mesh over which its experts cannot be split evenly.
    """
    described = run.describe()
    model, moe = described.model, dataclasses.replace(described.moe, dropless=True)
    if not model.forecasts:
        raise UserError(
            f"{run.path} is a language model and forecasts no series: moe-jax generate."
        )
    ranks = 1 if mesh is None else mesh.shape["expert"]
    if moe.num_experts % ranks:
        raise UserError(
            f"--mesh expert={ranks} does not divide the {moe.num_experts} experts of {run.path}: "
            f"choose a divisor."
        )
    config, weights = bolt_config(model), run.weights()
    abstract = nnx.eval_shape(lambda: make_model(model, moe, 0, rngs=nnx.Rngs(0)))
    placed = place(_RunCheckpoint(run.path, config, abstract, weights), mesh)
    return mixture_forecaster(config, placed, weights.bias_LE)
