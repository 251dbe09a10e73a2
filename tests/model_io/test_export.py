"""Export of runs and converted folders: the same weights in a folder that opens, experts in order,
tokenizers exact.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax import hf
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.data.tokenizer_files import copy_tokenizer, write_byte_tokenizer
from moe_jax.errors import UserError
from moe_jax.inference import convert
from moe_jax.inference.load import open_model
from moe_jax.inference.session import Session
from moe_jax.model_io.export import publish
from moe_jax.model_io.source import find
from tests.support import tiny_run
from tests.support.command import call
from tests.support.hf_folder import make_folder


def same_leaves(a: Path, b: Path, exact: bool = True) -> None:
    """Both folders give the same parameters."""
    one, other = find(a).weights(), hf.open_checkpoint(b)
    for path in other.shapes():
        left, right = one.leaf(path, None), other.leaf(path)
        np.testing.assert_array_equal(
            left if exact else left.astype(right.dtype), right, err_msg=path
        )


def test_a_run_becomes_a_folder_of_the_family_that_it_fits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tiny_run.finished(folder), tmp_path / "out"
    assert call("export", run, out) == 0
    assert "qwen3_moe, " in capsys.readouterr().err
    same_leaves(run, out)
    config = json.loads((out / "config.json").read_text())
    assert (config["max_position_embeddings"], config["eos_token_id"], config["vocab_size"]) == (
        32,
        256,
        264,
    )
    assert config["torch_dtype"] == "float32" and config["architectures"] == ["Qwen3MoeForCausalLM"]
    before, after = open_model(run), open_model(out)
    ids = after.tokenizer.encode("caf\u00e9 expert")
    assert ids == before.tokenizer.encode("caf\u00e9 expert") and after.eos_ids == before.eos_ids
    np.testing.assert_array_equal(Session(before).logits([ids]), Session(after).logits([ids]))
    assert call("export", run, tmp_path / "half", "--dtype", "bfloat16", "--step", "3") == 0
    assert {
        str(array.dtype) for array in load_file(tmp_path / "half" / "model.safetensors").values()
    } == {"bfloat16"}
    assert not np.array_equal(
        hf.open_checkpoint(out).leaf("embedding"),
        hf.open_checkpoint(tmp_path / "half").leaf("embedding"),
    )


@pytest.mark.slow
def test_empty_and_redundant_slots_are_left_behind(folder: Path, tmp_path: Path) -> None:
    """6 experts on 4 ranks, each with a redundant slot: 12 slots, of which 6 are wanted."""
    run = tiny_run.run(
        folder,
        tmp_path / "run",
        "moe.num_experts=6",
        "placement.redundant_slots=1",
        "train.steps=1",
    )
    publish(run, tmp_path / "out")
    assert hf.open_checkpoint(tmp_path / "out").shapes()["stacks/0/blocks/0/mlp/experts/down"] == (
        2,
        6,
        32,
        16,
    )
    before, after = open_model(run), open_model(tmp_path / "out")
    for one, other in zip(
        jax.tree.leaves(before.engine.params), jax.tree.leaves(after.engine.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("deepseek_v3-plain", "float32"), ("gpt_oss-plain", "bfloat16"), ("olmoe-clip", "float32")],
)
def test_there_and_back_through_a_converted_folder(case: str, dtype: str, tmp_path: Path) -> None:
    folder = make_folder(case, tmp_path / "in")
    convert.convert(
        folder, tmp_path / "mid", dtype=dtype, quantize=None, group=64, step=None, fallback=False
    )
    publish(tmp_path / "mid", tmp_path / "out")
    same_leaves(folder, tmp_path / "out", exact=dtype == "float32")
    first, last = hf.open_checkpoint(folder), hf.open_checkpoint(tmp_path / "out")
    assert (first.model, first.moe, first.eos_ids) == (last.model, last.moe, last.eos_ids)
    if first.bias_LE() is not None:
        np.testing.assert_array_equal(first.bias_LE(), last.bias_LE())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert "chat_template" in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_parts_of_leaves(folder: Path) -> None:
    """Weights of a run take the indices that those of a Hugging Face folder take."""
    run = tiny_run.finished(folder)
    leaf = find(run).weights().leaf
    path = "stacks/0/blocks/0/mlp/experts/down"
    whole, part = (
        leaf(path, None),
        leaf(path, (slice(1, 2), np.array([2, -1]), slice(4, 8), slice(None))),
    )
    np.testing.assert_array_equal(part[:, 0], whole[1:2, 2, 4:8])
    assert part.shape == (1, 2, 4, 16) and not part[:, 1].any()
    np.testing.assert_array_equal(
        leaf("embedding", (slice(0, 4), slice(5, 7))), leaf("embedding", None)[:4, 5:7]
    )


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run.finished(folder)
    quantised = tmp_path / "int8"
    convert.convert(
        run, quantised, dtype=None, quantize="int8", group=64, step=None, fallback=False
    )
    (tmp_path / "empty").mkdir()
    sigmoid = tiny_run.run(folder, tmp_path / "sigmoid", "moe.score=sigmoid", "train.steps=1")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("name: x\n")
    capsys.readouterr()
    for arguments, message in (
        ((run, quantised), "exists already"),
        ((quantised, tmp_path / "out"), "was converted to int8"),
        ((tmp_path / "empty", tmp_path / "out"), "no config.json"),
        ((tmp_path / "missing", tmp_path / "out"), "does not exist"),
        ((sigmoid, tmp_path / "out"), "moe.score='sigmoid' cannot be exported"),
        ((tmp_path / "new", tmp_path / "out"), "holds no checkpoint"),
        ((run, tmp_path / "out", "--step", "99"), "99"),
        ((quantised, tmp_path / "out", "--step", "3"), "is not a run directory"),
        ((run, tmp_path / "out", "--dtype", "float16"), "--dtype 'float16'"),
    ):
        assert call("export", *arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert (
            message in err
            and err.count("\n") == 1
            and out == ""
            and not (tmp_path / "out").exists()
        )
    with pytest.raises(UserError, match="is a configuration"):
        publish(tiny_run.config_file(folder), tmp_path / "out")


def test_the_byte_tokenizer_is_exact(tmp_path: Path) -> None:
    """Read by transformers and by tokenizers, its files cut and join as `bytes` does, whatever the
    text.
    """
    write_byte_tokenizer(tmp_path)
    ours, folder, file = (
        load_tokenizer(str(spec)) for spec in ("bytes", tmp_path, tmp_path / "tokenizer.json")
    )
    assert [(one.num_ids, one.eos_id, one.bos_id) for one in (ours, folder, file)] == [
        (257, 256, None)
    ] * 3
    draw = random.Random(0)
    texts = [
        "",
        "  two  spaces\r\n\t",
        "".join(map(chr, range(0x250))),
        "\u4e13\u5bb6\U0001f600\x00",
    ]
    texts += [
        "".join(
            chr(draw.choice([draw.randrange(128), draw.randrange(0xE000, 0x110000)]))
            for _ in range(99)
        )
        for _ in range(50)
    ]
    for text in texts:
        ids = ours.encode(text)
        assert folder.encode(text) == file.encode(text) == folder.encode_prompt(text) == ids
        assert folder.decode(ids) == file.decode(ids) == ours.decode(ids)
    for _ in range(200):
        ids = [draw.randrange(264) for _ in range(20)]  # not UTF-8, with end and padding among them
        assert folder.decode(ids) == file.decode(ids) == ours.decode(ids)


def test_code_and_pickles_are_not_copied(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.py",
        "tokenizer.bin",
        "tokenization_x.py",
        "model.safetensors",
    ):
        (source / name).write_text("{}")
    copy_tokenizer(str(source), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tokenizer.json",
        "tokenizer.model",
    }
    copy_tokenizer(str(source / "tokenizer.json"), tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["tokenizer.json"]
