"""Train and run sharded mixture-of-experts transformers in JAX, the same from a laptop to a pod.

    import moe_jax

    model = moe_jax.load("Qwen/Qwen3-30B-A3B", quantize="int4")
    print(model.generate("def fibonacci(n):"))

`dir(moe_jax)` lists the API and docs/python_api.md shows it. What has another path is private and
may change. Nothing is imported before it is used, JAX included.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from moe_jax.config.load import load_config
    from moe_jax.config.model import ModelConfig, MoEConfig
    from moe_jax.config.schema import Config, MeshConfig, OptimizerConfig
    from moe_jax.errors import UserError
    from moe_jax.generation.model import TextModel
    from moe_jax.moe.standalone import MoELayer
    from moe_jax.moe.stats import LayerStats
    from moe_jax.parallel.mesh import make_mesh
    from moe_jax.parallel.sharding import specs
    from moe_jax.placement.plan import plan_placement
    from moe_jax.placement.table import Placement, contiguous
    from moe_jax.tracking.history import History, read_history
    from moe_jax.tracking.metrics import read_metrics
    from moe_jax.tracking.traffic import read_measured
    from moe_jax.training.custom import batch_from_tokens, loss_and_gradients
    from moe_jax.training.placement.migration import Migration
    from moe_jax.training.result import TrainingResult
    from moe_jax.training.step import TrainProgram

__version__ = "0.1.0"

# Where each name of the API is defined.
_HOMES = {
    "Config": "moe_jax.config.schema",
    "History": "moe_jax.tracking.history",
    "LayerStats": "moe_jax.moe.stats",
    "MeshConfig": "moe_jax.config.schema",
    "Migration": "moe_jax.training.placement.migration",
    "MoEConfig": "moe_jax.config.model",
    "MoELayer": "moe_jax.moe.standalone",
    "ModelConfig": "moe_jax.config.model",
    "OptimizerConfig": "moe_jax.config.schema",
    "Placement": "moe_jax.placement.table",
    "TextModel": "moe_jax.generation.model",
    "TrainProgram": "moe_jax.training.step",
    "UserError": "moe_jax.errors",
    "batch_from_tokens": "moe_jax.training.custom",
    "contiguous": "moe_jax.placement.table",
    "load_config": "moe_jax.config.load",
    "loss_and_gradients": "moe_jax.training.custom",
    "make_mesh": "moe_jax.parallel.mesh",
    "plan_placement": "moe_jax.placement.plan",
    "read_history": "moe_jax.tracking.history",
    "read_measured": "moe_jax.tracking.traffic",
    "read_metrics": "moe_jax.tracking.metrics",
    "specs": "moe_jax.parallel.sharding",
}

__all__ = [
    "Config",
    "History",
    "LayerStats",
    "MeshConfig",
    "Migration",
    "MoEConfig",
    "MoELayer",
    "ModelConfig",
    "OptimizerConfig",
    "Placement",
    "TextModel",
    "TrainProgram",
    "UserError",
    "__version__",
    "batch_from_tokens",
    "contiguous",
    "load",
    "load_config",
    "loss_and_gradients",
    "make_mesh",
    "plan_placement",
    "read_history",
    "read_measured",
    "read_metrics",
    "read_run",
    "specs",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


def load(
    path: Path | str,
    *,
    mesh: MeshConfig | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    group: int = 64,
    memory: int | None = None,
    step: int | None = None,
    fallback: bool = False,
    context: int | None = None,
    expert_cache: int | None = None,
) -> TextModel:
    """A model to generate text with.

    Args:
      path: a Hugging Face folder, a run's directory, a converted folder, or `org/name` on the
        Hugging Face hub, which is downloaded.
      mesh: the devices, by default one.
      dtype: "float32" or "bfloat16"; by default float32 on CPU and bfloat16 elsewhere.
      quantize: "int8" or "int4" holds experts and projections in so many bits; `group` inputs share
        a scale with int4.
      memory: bytes per device for weights; by default what the platform reports.
      step, fallback: which checkpoint of a run: that of a step; with `fallback` an older one where
        it is damaged.
      context: tokens that a text may have, if not as many as the model was made for.
      expert_cache: experts per layer that the device keeps, with the others in host memory.

    Raises UserError, one sentence, for what is wrong with the folder, the mesh or the memory.
    """
    from moe_jax.generation.arguments import check_load
    from moe_jax.generation.model import TextModel
    from moe_jax.inference.load import open_model
    from moe_jax.model_io.source import check_step, is_run
    from moe_jax.utils.files import local_path

    options: dict[str, Any] = {
        "mesh": mesh,
        "dtype": dtype,
        "quantize": quantize,
        "group": group,
        "memory": memory,
        "step": step,
        "fallback": fallback,
        "context": context,
        "expert_cache": expert_cache,
    }
    check_load(path, **options)
    place = local_path(path)
    check_step(place, step, fallback)
    loaded = open_model(place, **options)
    return TextModel(loaded, of_run=is_run(place))


def train(
    config: Path | str | Mapping[str, Any] | Config,
    run_dir: Path | str,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    fallback: bool = False,
) -> TrainingResult:
    """Trains a model into `run_dir` and says what came of it; `read_run` reads its history.

    Args:
      config: the path of a YAML configuration, its sections as nested dicts, or a `Config`.
      overrides: `key=value` strings on top of a configuration's path, as `--set` has them.
      resume, overwrite, fallback: as `moe-jax train` has them.

    Raises UserError, one sentence, for what the caller can correct.
    """
    from collections.abc import Mapping
    from pathlib import Path

    from moe_jax.config.load import load_config, section_from_dict, with_absolute_paths
    from moe_jax.config.schema import Config
    from moe_jax.errors import UserError
    from moe_jax.training.trainer import train as run_training
    from moe_jax.utils.files import local_path

    if isinstance(config, (str, Path)):
        tree = load_config(local_path(config), overrides)
    elif overrides:
        raise UserError("train: overrides change a YAML file: put the values into config itself.")
    else:
        tree = section_from_dict(Config, config) if isinstance(config, Mapping) else config
        tree = with_absolute_paths(tree)
    options = {"resume": resume, "overwrite": overwrite, "fallback": fallback}
    return run_training(tree, local_path(run_dir), **options)


def read_run(run_dir: Path | str) -> History:
    """The metrics of a run as columns: `history.train["loss"]`, `history.load_NLE` and so on.

    Raises UserError where the directory has none.
    """
    from moe_jax.tracking.history import read_history
    from moe_jax.tracking.metrics import FILE_NAME
    from moe_jax.utils.files import local_path

    return read_history(local_path(run_dir) / FILE_NAME)
