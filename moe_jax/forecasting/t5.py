"""Forecasts of Chronos-T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.errors import UserError
from moe_jax.forecasting.contexts import as_series, batches, left_padded, round_length
from moe_jax.forecasting.placed_model import PlacedModel
from moe_jax.forecasting.quantile_levels import LEVELS, check_levels
from moe_jax.models.chronos.bins import decode_tokens, encode_context
from moe_jax.models.chronos.config import ChronosT5Config
from moe_jax.models.chronos.t5 import ChronosT5, Drawing

UNIT = 32  # values by which contexts grow, so that few programs are compiled
CACHE_ROOM = 1 << 30  # bytes for keys and values on a device


class T5Forecaster:
    """A Chronos-T5 model on a mesh, a `Forecaster`; series of one variable, by sample paths."""

    multivariate = False
    quantiles: tuple[float, ...] = ()

    def __init__(self, config: ChronosT5Config, placed: PlacedModel):
        self.config, self.placed = config, placed
        self.context_length = config.context_length
        self.prediction_length = config.prediction_length

    def predict(
        self,
        inputs: Any,
        prediction_length: int | None = None,
        *,
        batch_size: int = 256,
        num_samples: int | None = None,
        seed: int = 0,
        first_series: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> np.ndarray:
        """Sample paths f32 [B, num_samples, H] of each series; what is None is the model's own.

        Beyond the trained horizon all paths go on from their median, as in the library. A series
        draws from a key of its number, counted from `first_series`, so that other series change
        nothing.
        """
        horizon = self.prediction_length if prediction_length is None else prediction_length
        own = self.config.sampling
        paths = own.num_samples if num_samples is None else num_samples
        drawing = Drawing(
            own.temperature if temperature is None else temperature,
            own.top_k if top_k is None else top_k,
            own.top_p if top_p is None else top_p,
        )
        _check(paths, drawing)
        series = as_series(inputs)
        forecasts = np.empty((len(series), paths, horizon), np.float32)
        size = min(batch_size, self._most_series(paths))
        for numbers, context_BT in batches(series, self.context_length, UNIT, size):
            keys = jax.random.key(seed, impl="threefry2x32"), first_series + numbers
            found = self._extend(context_BT, horizon, keys, paths, drawing)
            forecasts[numbers] = found
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
        **drawing: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Quantiles [B, H, levels] of the sample paths, linear between them, and their means [B,
        H]; the options are those of `predict`.
        """
        check_levels(quantile_levels)
        samples = self.predict(
            inputs,
            prediction_length,
            batch_size=batch_size,
            num_samples=num_samples,
            seed=seed,
            first_series=first_series,
            **drawing,
        )
        levels = np.asarray(quantile_levels, np.float32)
        quantiles = np.moveaxis(np.quantile(samples, levels, axis=1), 0, -1)
        return quantiles.astype(np.float32), samples.mean(axis=1)

    def _most_series(self, paths: int) -> int:
        """Series of which the keys and values have room on the devices."""
        stack = self.config.stack
        places = self.context_length + paths * self.prediction_length
        width = stack.num_heads * stack.head_width
        each = 2 * 4 * stack.num_decoder_layers * places * width
        return max(1, CACHE_ROOM // each) * self.placed.row_devices

    def _extend(
        self,
        context_BT: np.ndarray,
        horizon: int,
        keys: tuple[jax.Array, np.ndarray],
        paths: int,
        drawing: Drawing,
    ) -> np.ndarray:
        """Paths [B, N, horizon]; `keys` are the seed's and the numbers of the series."""
        blocks: list[np.ndarray] = []
        done = 0
        while done < horizon:
            if blocks:
                ordered = np.sort(blocks[-1], axis=1)
                median_BT = ordered[:, (paths - 1) // 2]  # of an even number the lower one
                context_BT = np.concatenate([context_BT, median_BT], axis=1)
                length = round_length(context_BT.shape[1], self.context_length, UNIT)
                context_BT = left_padded(context_BT, length)
            tokens = encode_context(context_BT, self.config.bins)
            steps = min(horizon - done, self.prediction_length)
            ids_BNT = self.placed.run(
                ChronosT5.generate,
                tokens.ids_BT,
                tokens.mask_BT,
                _keys(*keys, len(blocks)),
                steps=steps,
                paths=paths,
                drawing=drawing,
            )
            blocks.append(decode_tokens(ids_BNT, tokens.scale_B, self.config.bins))
            done += steps
        return np.concatenate(blocks, axis=-1)


def _keys(key: jax.Array, numbers: np.ndarray, block: int) -> np.ndarray:
    """The key of each series, uint32 [B, 2], for one of the blocks of steps that it draws."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = fold(jax.random.fold_in(key, block), np.asarray(numbers, np.uint32))
    return np.asarray(jax.random.key_data(keys))


def _check(paths: int, drawing: Drawing) -> None:
    """Raises UserError for options that leave nothing to draw."""
    if paths < 1:
        raise UserError(f"{paths} sample paths are none: ask for at least one.")
    if drawing.temperature <= 0:
        raise UserError(f"temperature={drawing.temperature} must be above 0: top_k=1 is greedy.")
    if drawing.top_k < 0 or not 0 < drawing.top_p <= 1:
        raise UserError(
            f"top_k={drawing.top_k} and top_p={drawing.top_p} must be at least 0, and in (0, 1]."
        )
