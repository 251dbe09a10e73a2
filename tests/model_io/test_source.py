"""What a folder is: each kind is found by what lies in it, and without JAX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.errors import UserError
from moe_jax.model_io.source import (
    HuggingFaceSource,
    PackedSource,
    RunSource,
    YamlSource,
    find,
    is_run,
)
from tests.support import ROOT


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("moe_jax.json", PackedSource),
        ("config.yaml", RunSource),
        ("config.json", HuggingFaceSource),
    ],
)
def test_a_folder_is_known_by_its_file(name: str, kind: type, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    assert find(tmp_path) == kind(tmp_path)
    assert is_run(tmp_path) == (kind is RunSource)


def test_a_file_is_a_configuration_and_has_no_weights() -> None:
    source = find(ROOT / "configs" / "tiny.yaml")
    assert isinstance(source, YamlSource) and source.describe().source == "configuration"
    with pytest.raises(UserError, match="is a configuration, which has no weights"):
        source.weights()


@pytest.mark.parametrize("name", ["config.json", "moe_jax.json"])
def test_a_file_of_a_model_is_not_a_configuration(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for file in (name, "model.safetensors"):
        with pytest.raises(UserError, match=f"{file} is one file of a model: name its folder"):
            find(tmp_path / file, yaml=True)
    (tmp_path / "train.yaml").write_text("{}")
    assert find(tmp_path / "train.yaml") == YamlSource(tmp_path / "train.yaml")


def test_gguf_is_said_to_be_that(tmp_path: Path) -> None:
    (tmp_path / "model-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="is GGUF, which is not read"):
        find(tmp_path / "model-Q4.gguf", yaml=True)


def test_nothing_and_a_checkpoint_of_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: give a Hugging Face folder, a run"):
        find(tmp_path / "nothing")
    for name in ("moe_jax.json", "config.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(UserError, match="is not a run directory: leave them out"):
            find(folder).weights(step=3)


def test_finding_imports_neither_jax_nor_pydantic() -> None:
    code = (
        "import sys; from pathlib import Path; from moe_jax.model_io.source import find; "
        "find(Path('configs/tiny.yaml')); print(*{'jax', 'numpy', 'pydantic'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")
