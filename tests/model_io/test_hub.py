"""Models on the hub, whose protocol a server of this machine speaks: what is fetched of them, by
which commands, and what is said where they cannot be had.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_jax import hf
from moe_jax.config.load import load_config
from moe_jax.errors import UserError
from moe_jax.inference.load import open_model
from moe_jax.model_io.export import publish
from moe_jax.model_io.hub import name_of
from moe_jax.model_io.source import HubSource, find, find_local
from moe_jax.training import initial_state
from moe_jax.training.resize.resize import Wanted, resize
from tests.support.command import call
from tests.support.fake_hub import FakeHub, fake_hub, hub_at
from tests.support.hf_folder import make_folder

NAME = "someone/tiny-moe"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository: a model, and what people also keep there."""
    folder = make_folder("qwen3_moe-plain", tmp_path_factory.mktemp("origin") / "model")
    (folder / "onnx").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "onnx" / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


@pytest.fixture
def hub(origin: Path, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache") as started:
        started.models[NAME] = origin
        yield started


def cached_files(tmp_path: Path) -> set[str]:
    """Names of the files that were downloaded."""
    snapshots = (tmp_path / "cache").glob("models--*/snapshots/*")
    return {file.name for folder in snapshots for file in folder.rglob("*")}


def test_inspect_fetches_the_config_and_headers_alone(
    hub: FakeHub, origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("inspect", NAME, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert call("inspect", origin, "--json") == 0
    local = json.loads(capsys.readouterr().out)
    # Beside it, the memory that is free differs from one moment to the next.
    assert found == local | {"name": "tiny-moe", "here": found["here"]}
    assert cached_files(tmp_path) <= {"config.json", "generation_config.json"}
    assert hub.fetched("model.safetensors")
    assert all(request.range for request in hub.fetched(".safetensors"))
    assert not hub.fetched("onnx/model.safetensors")


def test_the_index_says_which_shard_a_tensor_is_taken_from(
    hub: FakeHub, origin: Path, tmp_path: Path
) -> None:
    """A shard that another tensor of the same name lies in is passed over."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "sharded"
    shutil.copytree(origin, folder)
    tensors = load_file(origin / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    norm = "model.norm.weight"
    rest = {name: tensor for name, tensor in tensors.items() if name != norm}
    save_file(rest | {norm: np.zeros((3,), np.float32)}, folder / first)
    save_file({norm: tensors[norm]}, folder / second)
    weight_map = dict.fromkeys(rest, first) | {norm: second}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    hub.models[NAME] = folder
    assert find(Path(NAME)).describe().file_bytes == find(origin).describe().file_bytes
    del weight_map[norm]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"lacks tensors .*model\.norm\.weight"):
        find(Path(NAME)).describe()


def test_commands_download_what_a_model_needs_once(
    hub: FakeHub, origin: Path, tmp_path: Path
) -> None:
    loaded = open_model(NAME)
    assert loaded.name == "tiny-moe"
    files = cached_files(tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not files & {"pytorch_model.bin", "modeling.py", "onnx"}
    publish(Path(NAME), tmp_path / "out")
    for path, shape in hf.open_checkpoint(tmp_path / "out").shapes().items():
        one = hf.open_checkpoint(tmp_path / "out").leaf(path)
        assert one.shape == shape
        np.testing.assert_array_equal(one, hf.open_checkpoint(origin).leaf(path))
    assert call("convert", NAME, tmp_path / "packed") == 0
    assert len(hub.fetched("/model.safetensors")) == 1
    assert call("inspect", NAME) == 0  # by the files that are here
    assert len(hub.fetched("/model.safetensors")) == 1


def test_what_was_downloaded_needs_no_network(hub: FakeHub, tmp_path: Path) -> None:
    whole = find_local(Path(NAME))
    for offline in (False, True):
        with hub_at("http://127.0.0.1:1", tmp_path / "cache", offline=offline):
            assert find_local(Path(NAME)) == whole
            assert find(Path(NAME)).describe().name == "tiny-moe"


def test_training_starts_from_it(hub: FakeHub, origin: Path, tmp_path: Path) -> None:
    """A contradiction is refused before the weights are downloaded."""
    file = tmp_path / "tune.yaml"
    file.write_text(f"init_from: {NAME}\n")
    wrong = load_config(file, ["model.width=64"])
    with pytest.raises(UserError, match=rf"model.width=64 but init_from={NAME} has 32"):
        initial_state.resolve(
            wrong, tmp_path, initial_state.Origin(wrong, tmp_path / "run"), resume=False
        )
    assert "model.safetensors" not in cached_files(tmp_path)
    config = load_config(file)
    assert config.init_from == NAME
    start = initial_state.Origin(config, tmp_path / "run")
    resolved = initial_state.resolve(config, tmp_path / "run", start, resume=False)
    assert (Path(resolved.data.tokenizer) / "tokenizer.json").is_file()
    leaf = start.local.weights().leaf("embedding", None)
    np.testing.assert_array_equal(leaf, hf.open_checkpoint(origin).leaf("embedding"))


def test_resizing_asks_its_headers_first(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{NAME} does not say how to train"):
        resize(Path(NAME), tmp_path / "out", Wanted(4))
    with pytest.raises(UserError, match=f"{NAME} has experts already"):
        resize(Path(NAME), tmp_path / "out", Wanted(4, config=tmp_path / "any.yaml"))
    assert "model.safetensors" not in cached_files(tmp_path)


# What cannot be had


def test_a_name_that_the_hub_does_not_have(hub: FakeHub, tmp_path: Path) -> None:
    refused = "^runs/frist is no folder here, and the hub has no model of that name, or a private"
    for ask in (open_model, lambda name: find(Path(name)).describe()):
        with pytest.raises(UserError, match=refused):
            ask("runs/frist")
    file = tmp_path / "tune.yaml"
    file.write_text("init_from: runs/frist\n")
    config = load_config(file)
    with pytest.raises(UserError, match=r"^init_from=runs/frist is no folder here"):
        initial_state.resolve(
            config, tmp_path, initial_state.Origin(config, tmp_path / "run"), resume=False
        )


def test_a_model_that_must_be_asked_for(hub: FakeHub) -> None:
    hub.gated.add(NAME)
    with pytest.raises(UserError, match=rf"ask at https://huggingface.co/{NAME}, then `hf auth"):
        find_local(Path(NAME))


def test_a_model_without_safetensors(hub: FakeHub, origin: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(origin, folder)
    (folder / "model.safetensors").unlink()
    hub.models[NAME] = folder
    for ask in (HubSource(NAME).describe, HubSource(NAME).download):
        with pytest.raises(UserError, match=f"{NAME} .*has no model.safetensors: choose one that"):
            ask()


@pytest.mark.parametrize("ask", [HubSource(NAME).describe, HubSource(NAME).download])
def test_no_network_is_said_as_that(ask, tmp_path: Path) -> None:
    with (
        hub_at("http://127.0.0.1:1", tmp_path),
        pytest.raises(
            UserError,
            match=f"{NAME} is no folder here, and the hub, which may have a model of that name, "
            r"cannot be reached \(.*\): name a folder, or try again with a network",
        ),
    ):
        ask()
    with (
        hub_at("http://127.0.0.1:1", tmp_path, offline=True),
        pytest.raises(UserError, match="HF_HUB_OFFLINE forbids to download it: unset that"),
    ):
        ask()


def test_paths_that_are_no_names_of_the_hub(tmp_path: Path) -> None:
    for text in ("../frist", "/runs/frist", "runs/first/frist", "configs/frist.yaml", "frist"):
        with pytest.raises(UserError, match="does not exist: give a Hugging Face folder"):
            find(Path(text))


def test_a_folder_of_the_cache_has_the_name_of_its_model(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen3-30B-A3B" / "snapshots" / "abc"
    assert (name_of(folder), name_of(tmp_path / "plain")) == ("Qwen3-30B-A3B", "plain")
