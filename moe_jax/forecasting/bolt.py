"""Forecasts of Chronos-Bolt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.forecasting.contexts import as_series, batches, left_padded, round_length
from moe_jax.forecasting.placed_model import PlacedModel
from moe_jax.forecasting.quantile_levels import LEVELS, equidistant_quantiles
from moe_jax.models.chronos.bolt import ChronosBolt
from moe_jax.models.chronos.config import ChronosBoltConfig

Pass = Callable[..., Any]  # (model, contexts [B, T], arrays kept) -> what `PlacedModel.run` gives


class BoltForecaster:
    """A model of Chronos-Bolt's form on a mesh, a `Forecaster`; series of one variable."""

    multivariate = False

    def __init__(
        self,
        config: ChronosBoltConfig,
        placed: PlacedModel,
        *,
        first_pass: Pass | None = None,
        later_pass: Pass | None = None,
    ):
        """`first_pass` gives quantiles of contexts and arrays, a row per series, which
        `later_pass` is given with the contexts that go on from them; without such arrays it is not
        called. By default both are those of Chronos-Bolt.
        """
        self.config, self.placed = config, placed
        self.first_pass, self.later_pass = first_pass or _bolt_pass, later_pass or _bolt_pass
        self.context_length, self.prediction_length = (
            config.context_length,
            config.prediction_length,
        )
        self.quantiles = config.quantiles

    def predict(
        self, inputs: Any, prediction_length: int | None = None, *, batch_size: int = 64
    ) -> np.ndarray:
        """Quantiles f32 [B, Q, H] of each series at the levels that the model was trained for.

        Beyond its trained horizon each of the Q quantiles so far is a path that the model continues
        with Q quantiles of its own, of whose Q x Q values quantiles are taken; and so on.
        """
        horizon = self.prediction_length if prediction_length is None else prediction_length
        series = as_series(inputs)
        forecasts = np.empty((len(series), len(self.config.quantiles), horizon), np.float32)
        sizes = (self.context_length, self.config.patch, batch_size)
        for numbers, context_BT in batches(series, *sizes):
            forecasts[numbers] = self._extend(context_BT, horizon, batch_size)
        return forecasts

    def predict_quantiles(
        self,
        inputs: Any,
        prediction_length: int | None = None,
        quantile_levels: Sequence[float] = LEVELS,
        *,
        batch_size: int = 64,
        num_samples: int | None = None,
        seed: int = 0,
        first_series: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Quantiles [B, H, levels], and the median [B, H], which Chronos-Bolt gives for a mean.
        It draws nothing: `num_samples`, `seed` and `first_series` change nothing.
        """
        del num_samples, seed, first_series
        forecasts = self.predict(inputs, prediction_length, batch_size=batch_size).swapaxes(1, 2)
        trained = self.config.quantiles
        chosen = equidistant_quantiles(forecasts, trained, quantile_levels)
        return chosen, forecasts[..., trained.index(0.5)]

    def _extend(self, context_BT: np.ndarray, horizon: int, batch_size: int) -> np.ndarray:
        (forecast_BQH, kept), count = self._pass(context_BT), len(self.config.quantiles)
        blocks = [forecast_BQH]
        paths_BQT = np.repeat(context_BT[:, None], count, axis=1)
        kept = tuple(np.repeat(part, count, axis=0) for part in kept)
        while len(blocks) * self.prediction_length < horizon:
            paths_BQT = np.concatenate([paths_BQT, blocks[-1]], axis=-1)
            length = round_length(paths_BQT.shape[-1], self.context_length, self.config.patch)
            rows = left_padded(paths_BQT.reshape(-1, paths_BQT.shape[-1]), length)
            cuts = [slice(start, start + batch_size) for start in range(0, len(rows), batch_size)]
            parts = [self._pass(rows[cut], tuple(part[cut] for part in kept))[0] for cut in cuts]
            values_BNH = np.concatenate(parts).reshape(len(context_BT), count**2, -1)
            levels = np.asarray(self.config.quantiles, np.float32)
            blocks.append(np.quantile(values_BNH, levels, axis=1).astype(np.float32).swapaxes(0, 1))
        return np.concatenate(blocks, axis=-1)[..., :horizon]

    def _pass(
        self, context_BT: np.ndarray, kept: tuple[np.ndarray, ...] = ()
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Quantiles [B, Q, H] of one pass, and what later passes keep of the first one."""
        if kept:
            return self.placed.run(self.later_pass, context_BT, *kept), kept
        return self.placed.run(self.first_pass, context_BT)


def _bolt_pass(model: ChronosBolt, context_BT: jax.Array) -> tuple[jax.Array, tuple[()]]:
    return model(context_BT), ()
