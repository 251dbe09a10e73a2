from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax import hf
from moe_jax.config.model import LatentConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.errors import UserError
from moe_jax.hf.config import map_config
from moe_jax.models.layer_pattern import count_moe_layers, layer_kinds
from tests.support.hf_cases import CASES, build


def copy(checkpoint: hf.Checkpoint, out: Path, **options) -> Path:
    hf.export(
        out,
        checkpoint.family,
        checkpoint.config,
        checkpoint.leaf,
        bias_LE=checkpoint.bias_LE(),
        **options,
    )
    return out


@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_is_bitwise_what_was_read(case: str, tmp_path: Path) -> None:
    folder = build(case, tmp_path / "in")
    checkpoint = hf.open_checkpoint(folder)
    again = hf.open_checkpoint(copy(checkpoint, tmp_path / "out"))
    assert (again.model, again.moe, again.context) == (
        checkpoint.model,
        checkpoint.moe,
        checkpoint.context,
    )
    for path in checkpoint.shapes():
        assert again.leaf(path).tobytes() == checkpoint.leaf(path).tobytes(), path
    if checkpoint.bias_LE() is not None:
        np.testing.assert_array_equal(again.bias_LE(), checkpoint.bias_LE())
    if "mxfp4" not in case:
        before, after = (
            load_file(folder / "model.safetensors"),
            load_file(tmp_path / "out" / "model.safetensors"),
        )
        assert after.keys() <= before.keys()
        assert all(
            before[name].tobytes() == array.tobytes() and before[name].shape == array.shape
            for name, array in after.items()
        )


def test_shards_and_their_index(tmp_path: Path) -> None:
    checkpoint = hf.open_checkpoint(build("qwen3_moe-plain", tmp_path / "in"))
    out = copy(checkpoint, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert (
        len(files) > 2
        and set(index["weight_map"].values()) == set(files)
        and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    )
    assert index["metadata"]["total_size"] == sum(
        checkpoint.leaf(path).nbytes for path in checkpoint.shapes()
    )
    again = hf.open_checkpoint(out)
    assert all(
        again.leaf(path).tobytes() == checkpoint.leaf(path).tobytes()
        for path in checkpoint.shapes()
    )
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"


def test_the_tokenizer_goes_along_and_nothing_else(tmp_path: Path) -> None:
    folder = build("llama-plain", tmp_path / "in")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "notes.txt",
        "modeling_x.py",
    ):
        (folder / name).write_text("{}")
    out = copy(hf.open_checkpoint(folder), tmp_path / "out", tokenizer_from=folder)
    copied = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert {path.name for path in out.iterdir()} == copied | {"config.json", "model.safetensors"}


def test_an_export_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = hf.open_checkpoint(build("llama-plain", tmp_path / "in"))
    out = tmp_path / "some" / "out"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the disk is full"):
        patch.setattr(os, "fsync", full)
        copy(checkpoint, out)
    assert not out.exists() and not out.with_name("out.part").exists()
    with pytest.raises(RuntimeError, match="device lost"):
        hf.export(
            out,
            checkpoint.family,
            checkpoint.config,
            lambda path: (_ for _ in ()).throw(RuntimeError("device lost")),
        )
    assert not list(out.parent.iterdir())
    out.with_name("out.part").mkdir()  # left by one that was killed
    copy(checkpoint, out)
    with pytest.raises(UserError, match="exists already"):
        copy(checkpoint, out)


def test_a_selection_bias_that_a_family_cannot_hold(tmp_path: Path) -> None:
    checkpoint = hf.open_checkpoint(build("mixtral-plain", tmp_path / "in"))
    with pytest.raises(UserError, match=r"moe\.bias_rate"):
        hf.export(
            tmp_path / "out",
            checkpoint.family,
            checkpoint.config,
            checkpoint.leaf,
            bias_LE=np.ones((3, 8), np.float32),
        )


# Models of our own

EXPERTS = MoEConfig(num_experts=4, top_k=2, hidden=24)
DENSE = MoEConfig(num_experts=1, top_k=1, first_dense=4)
YARN = RopeConfig(scaling="yarn", factor=4.0, original_length=64, beta_fast=20.0)


@pytest.mark.parametrize(
    ("family", "model", "moe"),
    [
        ("qwen3_moe", ModelConfig(), EXPERTS),
        (
            "qwen3_moe",
            ModelConfig(head_dim=16, sliding_window=8, rope=YARN),
            dataclasses.replace(EXPERTS, first_dense=1, every=2),
        ),
        (
            "qwen3_moe",
            ModelConfig(qkv_bias=True, out_bias=True),
            dataclasses.replace(EXPERTS, normalize="before"),
        ),
        ("olmoe", ModelConfig(qk_norm_over="width", clip_qkv=4.0), EXPERTS),
        (
            "qwen2_moe",
            ModelConfig(qk_norm=False, qkv_bias=True),
            dataclasses.replace(EXPERTS, shared_experts=2, shared_gate=True),
        ),
        (
            "mixtral",
            ModelConfig(
                qk_norm=False, rope=RopeConfig(scaling="dynamic", factor=2.0, original_length=256)
            ),
            EXPERTS,
        ),
        ("qwen3", ModelConfig(sliding_window=8, window_every=2), DENSE),
        (
            "llama",
            ModelConfig(
                qk_norm=False, mlp_bias=True, rope=RopeConfig(scaling="linear", factor=2.0)
            ),
            DENSE,
        ),
        ("mistral", ModelConfig(qk_norm=False, sliding_window=8), DENSE),
    ],
)
def test_a_model_of_our_own_gets_the_config_of_the_family_that_it_fits(
    family: str, model: ModelConfig, moe: MoEConfig
) -> None:
    found, config = hf.config_of(model, moe, 96, 256, eos_id=5)
    assert (
        found == family and config["eos_token_id"] == 5 and config["max_position_embeddings"] == 256
    )
    _, model_again, moe_again = map_config(config, "config.json")
    assert layer_kinds(model_again, moe_again) == layer_kinds(model, moe)
    assert (
        model_again.head_width == model.head_width
        and model_again.rope.scaling == model.rope.scaling
    )
    assert moe is DENSE or moe_again.aux_loss == pytest.approx(
        moe.aux_loss * count_moe_layers(model, moe)
    )  # pooled over layers


@pytest.mark.parametrize(
    ("setting", "model", "moe"),
    [
        ("moe.score='sigmoid'", {}, {"score": "sigmoid"}),
        ("moe.temperature=2.0", {}, {"temperature": 2.0}),
        ("moe.routed_scale=2.0", {}, {"routed_scale": 2.0}),
        ("moe.bias_rate=0.001", {}, {"bias_rate": 0.001}),
        ("moe.num_groups=2", {}, {"num_groups": 2, "top_groups": 1}),
        ("moe.shared_experts=24", {}, {"shared_experts": 1}),
        ("moe.normalize='before'", {"qk_norm": False}, {"normalize": "before"}),
        ("model.sinks=True", {"sinks": True}, {}),
        ("model.out_bias=True", {"out_bias": True}, {}),
        ("model.attention_scale=0.5", {"attention_scale": 0.5}, {}),
        ("model.rope.fraction=0.5", {"rope": RopeConfig(fraction=0.5)}, {}),
        (
            "model.rope.original_length=64",
            {"rope": RopeConfig(scaling="dynamic", factor=2.0, original_length=64)},
            {},
        ),
        ("model.sliding_window=", {"sliding_window": 8, "window_every": 2}, {}),
        (
            "model.latent=",
            {"latent": LatentConfig(kv_rank=16), "qk_norm": False, "num_kv_heads": 4},
            {},
        ),
    ],
)
def test_what_no_family_can_say_is_refused_by_name(setting: str, model: dict, moe: dict) -> None:
    with pytest.raises(UserError) as error:
        hf.config_of(ModelConfig(**model), dataclasses.replace(EXPERTS, **moe), 96, 256)
    assert str(error.value).startswith(setting)


def test_training_settings_do_not_stand_in_the_way() -> None:
    noisy = dataclasses.replace(
        EXPERTS,
        z_loss=0.1,
        input_noise=0.1,
        expert_dropout=0.1,
        capacity_factor=2.0,
        variance_loss=0.1,
    )
    assert (
        hf.config_of(ModelConfig(remat="full", compute_dtype="bfloat16"), noisy, 96, 256)[0]
        == "qwen3_moe"
    )
