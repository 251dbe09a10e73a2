"""A folder or a name on the hub, opened as a forecaster."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from moe_jax.errors import UserError
from moe_jax.forecasting.bolt import BoltForecaster
from moe_jax.forecasting.chronos2 import Chronos2Forecaster
from moe_jax.forecasting.forecaster import Forecaster
from moe_jax.forecasting.mixture import open_run
from moe_jax.forecasting.placed_model import place
from moe_jax.forecasting.t5 import T5Forecaster
from moe_jax.hf.chronos import open_chronos
from moe_jax.model_io import source
from moe_jax.models.chronos.config import ChronosBoltConfig, ChronosT5Config


def load_forecaster(path: Path | str, mesh: Mesh | None = None) -> Forecaster:
    """The Chronos-T5, Chronos-Bolt or Chronos-2 model in a folder or on the hub, or a forecaster
    trained here, by its run's directory; on a mesh (by default one device).

    Raises UserError for what is none of them.
    """
    found = source.find_local(Path(path))
    if isinstance(found, source.RunSource):
        return open_run(found, mesh)
    if not isinstance(found, source.HuggingFaceSource):
        raise UserError(
            f"{path} is no Chronos model: name a folder with its config.json, or a run."
        )
    checkpoint = open_chronos(found.path)
    config, placed = checkpoint.config, place(checkpoint, mesh)
    if isinstance(config, ChronosT5Config):
        return T5Forecaster(config, placed)
    if isinstance(config, ChronosBoltConfig):
        return BoltForecaster(config, placed)
    return Chronos2Forecaster(config, placed)
