"""Forms in which one model may be stored: shards that hold too much, a head beside its embedding or
without it, experts fused into one tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax import hf
from moe_jax.errors import UserError
from moe_jax.hf.export import export
from moe_jax.hf.families import FAMILIES
from moe_jax.hf.safetensors import Shards
from moe_jax.model_io.describe import describe_hugging_face
from tests.support.hf_cases import CASES, build, family

Tensors = dict[str, np.ndarray]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def change(folder: Path, edit: Callable[[Tensors], object], **config: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))


def assert_same_leaves(found: hf.Checkpoint, wanted: hf.Checkpoint) -> None:
    assert found.shapes() == wanted.shapes()
    for path in wanted.shapes():
        np.testing.assert_array_equal(found.leaf(path), wanted.leaf(path), err_msg=path)


# Shards


def shard(folder: Path, extra: Tensors, **moved: str) -> Tensors:
    """Cuts the checkpoint in two, the second shard holding `extra` too; `moved` changes the index,
    dots in names as `__`.
    """
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    first = names[: len(names) // 2]
    save_file({name: tensors[name] for name in first}, folder / PARTS[0])
    rest = {name: tensors[name] for name in names if name not in first}
    save_file(rest | extra, folder / PARTS[1])
    weights = {name: PARTS[name not in first] for name in names}
    weights |= {name.replace("__", "."): part for name, part in moved.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    return tensors


def test_the_index_decides_which_of_two_tensors_of_a_name_counts(tmp_path: Path) -> None:
    wanted = hf.open_checkpoint(build("llama-plain", tmp_path / "whole"))
    folder = build("llama-plain", tmp_path / "cut")
    stale = {HEAD: np.full((96, 32), 9, np.float32), "model.not.indexed": np.zeros(3, np.float32)}
    shard(folder, stale)
    assert_same_leaves(hf.open_checkpoint(folder), wanted)


def test_a_tensor_that_the_index_looks_for_in_vain(tmp_path: Path) -> None:
    folder = build("llama-plain", tmp_path)
    shard(folder, {}, lm_head__weight=PARTS[1])
    with pytest.raises(UserError, match=rf"{PARTS[1]} does not hold {HEAD}, which model\.safet"):
        hf.open_checkpoint(folder)


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    folder = build("llama-plain", tmp_path)
    tensors = shard(folder, {})
    save_file(tensors | {HEAD: tensors[HEAD] + 1}, folder / "model.safetensors")
    np.testing.assert_array_equal(hf.open_checkpoint(folder).leaf("head"), tensors[HEAD].T + 1)


# An output head that the config ties to the embedding


def tied(folder: Path, edit: Callable[[Tensors], object]) -> hf.Checkpoint:
    build("llama-plain", folder)
    change(folder, edit, tie_word_embeddings=True)
    return hf.open_checkpoint(folder)


def test_a_head_that_equals_the_embedding_is_the_embedding(tmp_path: Path) -> None:
    same = tied(tmp_path / "same", lambda t: t.update({HEAD: t[EMBEDDING]}))
    assert same.model.tied_embeddings and "head" not in same.shapes()

    def another_type(tensors: Tensors) -> None:
        tensors[EMBEDDING] = tensors[EMBEDDING].astype(ml_dtypes.bfloat16)
        tensors[HEAD] = tensors[EMBEDDING].astype(np.float32)

    assert tied(tmp_path / "types", another_type).model.tied_embeddings


@pytest.mark.parametrize("last_alone", [False, True])
def test_a_head_that_differs_is_used(tmp_path: Path, capsys, last_alone: bool) -> None:
    """Even in its last value alone."""

    def edit(tensors: Tensors) -> None:
        if last_alone:
            tensors[HEAD] = tensors[EMBEDDING].copy()
            tensors[HEAD][-1, -1] += 1e-3

    folder = tmp_path / "model"
    checkpoint = tied(folder, edit)
    tensors = load_file(folder / "model.safetensors")
    assert not checkpoint.model.tied_embeddings
    np.testing.assert_array_equal(checkpoint.leaf("head"), tensors[HEAD].T)
    np.testing.assert_array_equal(checkpoint.leaf("embedding"), tensors[EMBEDDING].T)
    described = describe_hugging_face(folder)
    assert not described.model.tied_embeddings and described.file_bytes is not None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{HEAD} is not {EMBEDDING}: both are used" in said
    # The config that goes with the model says so too, and the head survives an export.
    assert described.hf_config == checkpoint.config
    export(tmp_path / "out", checkpoint.family, checkpoint.config, checkpoint.leaf)
    assert_same_leaves(hf.open_checkpoint(tmp_path / "out"), checkpoint)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_either_of_the_two_serves_as_both(tmp_path: Path, name: str) -> None:
    def edit(tensors: Tensors) -> None:
        alone = tensors[EMBEDDING]
        tensors.pop(EMBEDDING), tensors.pop(HEAD)
        tensors[name] = alone

    checkpoint = tied(tmp_path, edit)
    wanted = build("llama-plain", tmp_path / "whole")
    assert checkpoint.model.tied_embeddings and "head" not in checkpoint.shapes()
    np.testing.assert_array_equal(
        checkpoint.leaf("embedding"), load_file(wanted / "model.safetensors")[EMBEDDING].T
    )


def test_neither_of_the_two_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"lacks tensors .* {re.escape(EMBEDDING)}"):
        tied(tmp_path, lambda tensors: (tensors.pop(EMBEDDING), tensors.pop(HEAD)))


# Experts in one tensor


def fuse(tensors: Tensors) -> None:
    """As transformers 5 holds them: [E, 2 I, D], gate before up, and [E, D, I]; Mixtral's block is
    called `mlp`.
    """
    gate, up, down = ("gate_proj", "up_proj", "down_proj")
    if any("block_sparse_moe" in name for name in tensors):
        gate, up, down = "w1", "w3", "w2"
        for name in [name for name in tensors if "block_sparse_moe" in name]:
            tensors[name.replace("block_sparse_moe", "mlp")] = tensors.pop(name)
    blocks = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
    for block in blocks:
        experts = 0
        while f"{block}.experts.{experts}.{down}.weight" in tensors:
            experts += 1

        def stacked(part: str, block: str = block, experts: int = experts) -> np.ndarray:
            names = [f"{block}.experts.{number}.{part}.weight" for number in range(experts)]
            return np.stack([tensors.pop(name) for name in names])

        gate_up = np.concatenate([stacked(gate), stacked(up)], axis=1)
        tensors[f"{block}.experts.gate_up_proj"] = gate_up
        tensors[f"{block}.experts.down_proj"] = stacked(down)


FUSED = [case for case in CASES if FAMILIES[family(case)].fused]


def test_every_family_with_experts_knows_a_fused_form() -> None:
    dense = {"llama", "mistral", "qwen3"}
    assert {name for name in FAMILIES if not FAMILIES[name].fused} == dense | {"gpt_oss"}
    assert {family(case) for case in FUSED} == {name for name in FAMILIES if FAMILIES[name].fused}


@pytest.mark.parametrize("case", FUSED)
def test_fused_experts_are_those_of_tensors_of_their_own(tmp_path: Path, case: str) -> None:
    wanted = hf.open_checkpoint(build(case, tmp_path / "apart"))
    folder = build(case, tmp_path / "fused")
    change(folder, fuse)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in _names(folder))
    found = hf.open_checkpoint(folder)
    assert_same_leaves(found, wanted)
    assert found.moe == wanted.moe and found.model == wanted.model
    # Of a few experts, and of a part of each, the bytes of these alone are read.
    path = next(path for path in found.shapes() if path.endswith("experts/gate_up"))
    index = (slice(0, 1), np.array([2, -1]), slice(3, 9), slice(1, 2), slice(0, 5))
    before = found.bytes_read
    part = found.leaf(path, index)
    np.testing.assert_array_equal(part, wanted.leaf(path, index))
    assert found.bytes_read - before == part.nbytes // 2


def test_a_layer_without_its_fused_tensor_is_named(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        fuse(tensors)
        tensors.pop("model.layers.1.mlp.experts.down_proj")

    folder = build("mixtral-plain", tmp_path)
    change(folder, edit)
    with pytest.raises(UserError, match=r"lacks tensors .* model\.layers\.1\.mlp\.experts\.down"):
        hf.open_checkpoint(folder)


def _names(folder: Path) -> list[str]:
    return list(load_file(folder / "model.safetensors"))


# Files that are not what their names say


def test_weights_that_a_clone_or_a_download_left_out(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n"
    single = tmp_path / "model.safetensors"
    single.write_bytes(pointer)
    with pytest.raises(UserError, match="is a pointer of Git LFS, so run `git lfs pull`"):
        Shards(tmp_path)
    single.write_bytes(b"<!DOCTYPE html><html>404</html>")
    with pytest.raises(UserError, match="is not a safetensors file: download it again"):
        Shards(tmp_path)
    single.rename(tmp_path / PARTS[0])
    with pytest.raises(UserError, match=f"holds {PARTS[0]} and neither .* nor .*index.json"):
        Shards(tmp_path)
