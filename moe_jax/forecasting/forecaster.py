"""What every forecaster gives, in the shapes that Chronos' own pipelines have.

    quantiles, mean = forecaster.predict_quantiles(series, 24, [0.1, 0.5, 0.9])

The jobs of this room (frames, evaluation) know forecasters by this protocol alone: the seasonal
naive baseline, the families of Chronos and runs of ours are used alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

ForecastTask = Mapping[str, Any]
"""A series with covariates, as Chronos-2 takes it: `target` [T] or [variates, T];
`past_covariates`, by name [T], numbers or text; `future_covariates`, by name [H], whose names
`past_covariates` has too.
"""

Forecasts = np.ndarray | Sequence[np.ndarray]
"""One array for all inputs, or one for each."""


class Forecaster(Protocol):
    """A model that continues series. A missing value is NaN."""

    @property
    def context_length(self) -> int | None:
        """Values of a series that are read, its last ones; None for all of them."""

    @property
    def prediction_length(self) -> int | None:
        """Steps that the model was trained to forecast at once; None where there is no limit."""

    @property
    def quantiles(self) -> tuple[float, ...]:
        """The levels that the model was trained for, ascending; empty where it gives sample paths,
        of which any level can be taken.
        """

    @property
    def multivariate(self) -> bool:
        """Whether inputs may be [variates, T] or tasks; without, each is [T]."""

    def predict_quantiles(
        self,
        inputs: Sequence[Any],
        prediction_length: int,
        quantile_levels: Sequence[float],
        *,
        batch_size: int = 256,
        num_samples: int | None = None,
        seed: int = 0,
        first_series: int = 0,
    ) -> tuple[Forecasts, Forecasts]:
        """Quantiles and means of the next steps: arrays [B, H, levels] and [B, H], and of
        multivariate forecasters lists of B such [targets, H, levels] and [targets, H].

        Args:
          inputs: B arrays [T] or [variates, T], or tasks; lengths may differ.
          prediction_length: H, which may be beyond the trained one.
          quantile_levels: any in (0, 1).
          batch_size: rows that are computed together; it changes no forecast.
          num_samples: sample paths per series, of models that give them; None is the model's own.
          seed: of the sample paths. Each series draws from a key of its own, by its number.
          first_series: number of the first input, where the inputs are a part of more.

        Raises UserError for an input that is not of these, and for infinities.
        """
