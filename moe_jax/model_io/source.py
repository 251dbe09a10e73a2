"""What a folder with a model is, decided once: `find`.

    source = find(Path("runs/first"))          # a RunSource
    source.describe()                          # the model, without its weights
    source.weights(step=2000).leaf("embedding")

Command lines ask here before JAX is imported, so that a mistake answers at once: this module needs
the standard library, and what reads configurations and arrays is imported by the methods that do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moe_jax.errors import UserError
from moe_jax.model_io.packed_header import PACKED_HEADER
from moe_jax.utils.files import is_hub_name

if TYPE_CHECKING:
    from moe_jax.model_io.describe import Description
    from moe_jax.model_io.weights import Weights

DTYPES = ("float32", "bfloat16")
QUANTIZED = ("int8", "int4")
INT4_GROUP = 64  # weights that share a scale, if nobody says otherwise


class HuggingFaceSource(NamedTuple):
    """A folder with a config.json, and as a rule safetensors, of a family that is supported."""

    path: Path

    def describe(self) -> Description:
        """The model that config.json describes, checked against the headers of its weights."""
        from moe_jax.model_io.describe import describe_hugging_face

        return describe_hugging_face(self.path)

    def weights(self, *, step: int | None = None, fallback: bool = False) -> Weights:
        """Its weights, read by byte ranges as they are asked for."""
        from moe_jax.model_io.weights import hugging_face_weights

        check_step(self.path, step, fallback)
        return hugging_face_weights(self.path)


class RunSource(NamedTuple):
    """A directory that `moe-jax train` wrote, known by its config.yaml."""

    path: Path

    def describe(self) -> Description:
        """The model that config.yaml describes."""
        from moe_jax.model_io.describe import describe_run

        return describe_run(self.path)

    def weights(self, *, step: int | None = None, fallback: bool = False) -> Weights:
        """Those of a checkpoint, which `step` and `fallback` choose as in
        `Checkpoints.restore_latest`.
        """
        from moe_jax.model_io.weights import run_weights

        return run_weights(self.path, self.describe(), step, fallback)


class PackedSource(NamedTuple):
    """A folder that `moe-jax convert` wrote, known by its moe_jax.json."""

    path: Path

    def describe(self) -> Description:
        """The model that moe_jax.json describes."""
        from moe_jax.model_io.describe import describe_packed

        return describe_packed(self.path)

    def weights(self, *, step: int | None = None, fallback: bool = False) -> Weights:
        """Its weights. Raises UserError where they are quantised, which lost what they were."""
        from moe_jax.model_io.weights import packed_weights

        check_step(self.path, step, fallback)
        return packed_weights(self.path, self.describe())


class YamlSource(NamedTuple):
    """A configuration to train by, which describes a model and has no weights."""

    path: Path

    def describe(self) -> Description:
        """The model that the configuration describes."""
        from moe_jax.model_io.describe import describe_yaml

        return describe_yaml(self.path)

    def weights(self, *, step: int | None = None, fallback: bool = False) -> Weights:
        """Raises UserError."""
        raise UserError(
            f"{self.path} is a configuration, which has no weights: name a run directory or a "
            f"folder with a checkpoint."
        )


class HubSource(NamedTuple):
    """A name on the Hugging Face hub, about which nobody was asked yet."""

    name: str
    field: str = ""
    """What the user gave it as, such as `init_from=`; begins the messages."""

    def describe(self) -> Description:
        """The model that its config.json and the headers of its weights describe: no more is
        fetched. Raises UserError where it cannot be had.
        """
        from moe_jax.model_io.describe import describe_hugging_face
        from moe_jax.model_io.hub import fetch_headers

        return describe_hugging_face(*fetch_headers(self.name, self.field))

    def download(self) -> HuggingFaceSource:
        """The folder with the whole model. Raises UserError where it cannot be had."""
        from moe_jax.model_io.hub import download

        return HuggingFaceSource(download(self.name, self.field))

    def weights(self, *, step: int | None = None, fallback: bool = False) -> Weights:
        """Its weights, downloaded."""
        return self.download().weights(step=step, fallback=fallback)


LocalSource = HuggingFaceSource | RunSource | PackedSource | YamlSource
Source = LocalSource | HubSource


def find_local(path: Path) -> LocalSource:
    """What is at a path or, downloaded, on the hub. Raises UserError where there is nothing."""
    source = find(path)
    return source.download() if isinstance(source, HubSource) else source


def find(path: Path, *, yaml: bool = False) -> Source:
    """What is at a path, or on the hub as far as its name tells. Raises UserError where there can
    be nothing; with `yaml` it offers a configuration too, which only describes a model.
    """
    if (path / PACKED_HEADER).is_file():
        return PackedSource(path)
    if is_run(path):
        return RunSource(path)
    if path.is_file():
        _refuse_part(path)
        return YamlSource(path)
    if path.is_dir():
        return HuggingFaceSource(path)
    if is_hub_name(path):
        return HubSource(path.as_posix())
    also = ", or a YAML configuration" if yaml else ""
    raise UserError(
        f"{path} does not exist: give a Hugging Face folder, a run, a converted folder, or a model "
        f"on the hub such as Qwen/Qwen3-30B-A3B{also}."
    )


def _refuse_part(path: Path) -> None:
    """Raises UserError for a file of a model where its folder is wanted."""
    if path.suffix == ".gguf":
        raise UserError(f"{path} is GGUF, which is not read: take the model's safetensors.")
    folder = path.parent
    kept = (folder / "config.json").is_file() or (folder / PACKED_HEADER).is_file()
    if kept and path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path} is one file of a model: name its folder, {folder}.")


def is_run(path: Path) -> bool:
    """Whether a path is the directory of a run."""
    return (path / "config.yaml").is_file()


def check_step(path: Path, step: int | None, fallback: bool) -> None:
    """Raises UserError where a checkpoint is chosen in what is not a run."""
    if (step is not None or fallback) and not is_run(path):
        raise UserError(
            f"--step and --fallback choose a run's checkpoint and {path} is not a run directory: "
            f"leave them out."
        )


def require_run(run_dir: Path) -> None:
    """Raises UserError where `run_dir` is not the directory of a run."""
    if not is_run(run_dir):
        raise UserError(
            f"{run_dir} is not a run directory (it has no config.yaml): give the --run-dir of a "
            f"`moe-jax train`."
        )
