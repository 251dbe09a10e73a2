"""Forecasts of Chronos-2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moe_jax.forecasting.contexts import left_padded, round_length
from moe_jax.forecasting.placed_model import PlacedModel, rounded
from moe_jax.forecasting.quantile_levels import (
    LEVELS,
    check_levels,
    interpolate_quantiles,
    level_shares,
    weighted_quantiles,
)
from moe_jax.forecasting.tasks import Group, as_groups
from moe_jax.models.chronos.chronos2 import Chronos2
from moe_jax.models.chronos.config import Chronos2Config

SCORE_ROOM = 1 << 30  # bytes for the scores of a layer on a device


class Chronos2Forecaster:
    """A Chronos-2 model on a mesh, a `Forecaster`; series of several variables, with covariates."""

    multivariate = True

    def __init__(self, config: Chronos2Config, placed: PlacedModel):
        self.config, self.placed = config, placed
        self.context_length = config.context_length
        self.prediction_length = config.prediction_length
        self.quantiles = config.quantiles

    def predict(
        self,
        inputs: Any,
        prediction_length: int | None = None,
        *,
        batch_size: int = 256,
        cross_learning: bool = False,
    ) -> list[np.ndarray]:
        """Quantiles f32 [targets, Q, H] of each input (`as_groups`) at the levels that the model
        was trained for.

        `batch_size` counts rows. With `cross_learning` all rows of a batch learn from each other,
        so that forecasts depend on it.
        """
        horizon = self.prediction_length if prediction_length is None else prediction_length
        groups = as_groups(inputs, horizon)
        forecasts: list[Any] = [None] * len(groups)
        for numbers, chosen in self._batches(groups, batch_size, cross_learning):
            merged = [_merged(chosen)] if cross_learning else chosen
            found = iter(self._forecast(merged, horizon, batch_size))
            whole = next(found) if cross_learning else None
            start = 0
            for number, group in zip(numbers, chosen, strict=True):
                rows = next(found) if whole is None else whole[start:]
                forecasts[number] = rows[: group.targets]
                start += len(group.context_RT)
        return forecasts

    def predict_quantiles(
        self,
        inputs: Any,
        prediction_length: int | None = None,
        quantile_levels: Sequence[float] = LEVELS,
        *,
        batch_size: int = 256,
        num_samples: int | None = None,
        seed: int = 0,
        first_series: int = 0,
        cross_learning: bool = False,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Quantiles [targets, H, levels] of each input, and medians [targets, H], which Chronos-2
        gives for means. It draws nothing: `num_samples`, `seed` and `first_series` change
        nothing.
        """
        del num_samples, seed, first_series
        check_levels(quantile_levels)
        trained = self.quantiles
        quantiles, medians = [], []
        for forecast in self.predict(
            inputs, prediction_length, batch_size=batch_size, cross_learning=cross_learning
        ):
            values = forecast.swapaxes(1, 2)
            medians.append(values[..., trained.index(0.5)])
            if set(quantile_levels) <= set(trained):
                quantiles.append(values[..., [trained.index(one) for one in quantile_levels]])
            else:
                quantiles.append(
                    interpolate_quantiles(quantile_levels, np.asarray(trained, np.float32), values)
                )
        return quantiles, medians

    def _batches(
        self, groups: list[Group], batch_size: int, in_order: bool
    ) -> Iterator[tuple[list[int], list[Group]]]:
        """Groups with numbers, of equally many rows and like lengths together; or in their order,
        until there are enough rows, as the library batches what learns from each other.
        """
        order = list(range(len(groups)))
        if not in_order:
            order.sort(key=lambda at: groups[at].context_RT.shape, reverse=True)
        batch: list[int] = []
        rows = 0
        for at in order:
            shape = groups[at].context_RT.shape
            other = batch and not in_order and groups[batch[0]].context_RT.shape[0] != shape[0]
            if batch and (other or rows >= batch_size):
                yield batch, [groups[one] for one in batch]
                batch, rows = [], 0
            batch.append(at)
            rows += shape[0]
        if batch:
            yield batch, [groups[one] for one in batch]

    def _forecast(self, groups: list[Group], horizon: int, batch_size: int) -> np.ndarray:
        """Quantiles [G, R, Q, horizon] of groups of equally many rows.

        Beyond one pass each of nine quantiles so far is a path of its whole group, known covariates
        with their true values; of the values with which the model continues all paths, weighted,
        quantiles are taken.
        """
        count, most = len(groups[0].context_RT), self.config.max_output_patches
        length = round_length(
            max(group.context_RT.shape[1] for group in groups),
            self.context_length,
            self.config.patch,
        )
        context = np.stack([left_padded(group.context_RT, length) for group in groups])
        future = np.stack([group.future_RH for group in groups])
        batch = max(1, batch_size // count)
        blocks: list[np.ndarray] = []
        done = 0
        while done < horizon:
            patches = min(-(-(horizon - done) // self.config.patch), most)
            if not blocks:
                block = self._pass(context, future, patches, batch)
            else:
                if len(blocks) == 1:
                    context, future = (
                        np.repeat(array[:, None], len(LEVELS), axis=1)
                        for array in (context, future)
                    )
                context, future = self._with_paths(context, future, blocks[-1])
                block = self._pass_of_paths(context, future, patches, batch)
            blocks.append(block)
            done += block.shape[-1]
        return np.concatenate(blocks, axis=-1)[..., :horizon]

    def _with_paths(
        self, context: np.ndarray, future: np.ndarray, block: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Contexts [G, N, R, T] with a forecast [G, R, Q, h] behind them, of which each path N has
        one level, or what is known; and the future after it.
        """
        trained, steps = np.asarray(self.quantiles, np.float32), block.shape[-1]
        levels = interpolate_quantiles(LEVELS, trained, np.moveaxis(block, 2, -1))
        paths = np.moveaxis(levels, -1, 1)
        known = future[..., :steps]
        short = steps - known.shape[-1]
        known = np.pad(known, [*[(0, 0)] * 3, (0, short)], constant_values=np.nan)
        paths = np.where(np.isnan(known), paths, known)
        context = np.concatenate([context, paths], axis=-1)[..., -self.context_length :]
        return context.astype(np.float32), future[..., steps:]

    def _pass_of_paths(
        self, context: np.ndarray, future: np.ndarray, patches: int, batch: int
    ) -> np.ndarray:
        """One pass over all paths [G, N, R, T], as quantiles [G, R, Q, h] of all their values."""
        groups, paths, count, length = context.shape
        length = round_length(length, self.context_length, self.config.patch)
        rows = left_padded(context.reshape(-1, context.shape[-1]), length)
        given = rows.reshape(-1, count, length), future.reshape(-1, count, future.shape[-1])
        values = self._pass(*given, patches, batch)
        values = values.reshape(groups, paths, *values.shape[1:])
        samples = np.moveaxis(values, (1, 3), (3, 4))  # [G, R, h, N, Q]
        samples = samples.reshape(*samples.shape[:3], -1)
        weights = np.outer(level_shares(LEVELS), level_shares(self.quantiles)).reshape(-1)
        return np.moveaxis(weighted_quantiles(self.quantiles, weights, samples), -1, 2)

    def _pass(
        self, context: np.ndarray, future: np.ndarray, patches: int, batch: int
    ) -> np.ndarray:
        """The model over groups [G, R, T], `batch` at a time: [G, R, Q, patches x P]."""
        steps, (groups, count, _) = patches * self.config.patch, context.shape
        future = future[..., :steps]
        missing = steps - future.shape[-1]
        future = np.pad(future, ((0, 0), (0, 0), (0, missing)), constant_values=np.nan)
        spare = 0 if count == 1 else rounded(count) - count  # rows, so that few programs are made
        real = np.pad(np.ones((groups, count), bool), ((0, 0), (0, spare)))
        context, future = (
            np.pad(array, ((0, 0), (0, spare), (0, 0)), constant_values=np.nan)
            for array in (context, future)
        )
        places = -(-context.shape[2] // self.config.patch) + 1 + patches
        scores = 4 * self.config.stack.num_heads * places**2 * (count + spare)  # bytes of a group
        batch = min(batch, max(1, SCORE_ROOM // scores) * self.placed.row_devices)
        parts = [
            self.placed.run(
                Chronos2.__call__, *(a[at : at + batch] for a in (context, future, real))
            )
            for at in range(0, groups, batch)
        ]
        return np.concatenate(parts)[:, :count]


def _merged(groups: list[Group]) -> Group:
    """All rows of groups as one group."""
    length = max(group.context_RT.shape[1] for group in groups)
    context = np.concatenate([left_padded(group.context_RT, length) for group in groups])
    future = np.concatenate([group.future_RH for group in groups])
    return Group(context, future, len(context))
