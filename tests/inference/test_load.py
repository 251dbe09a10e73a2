"""Reading checkpoints: no more bytes than are held, exactly, and in no more memory than that
takes.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from moe_jax import hf
from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.inference import load, memory, read_weights
from moe_jax.inference.load import open_model
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.paths import by_path, nested
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.models.weight_layout import bytes_of, loading_bytes
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous
from moe_jax.runtime.metal import METAL_ON_CPU
from moe_jax.runtime.platform import PLATFORMS, standing_in
from tests.support.command import run_module
from tests.support.hf_folder import make_folder
from tests.support.slow import slow_unless
from tests.support.small_models import VOCAB, draw
from tests.support.tokenizers import CHATML

MODEL = ModelConfig(
    num_layers=3, width=32, num_heads=4, num_kv_heads=4, hidden=48, tied_embeddings=False
)
MOE = MoEConfig(num_experts=8, top_k=2, hidden=16, first_dense=1)
MESHES = [{}, {"expert": 2}, {"tensor": 2}, {"expert": 2, "tensor": 2}, {"data": 2, "expert": 4}]
HALF = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint in one type, and its weights."""
    leaves = {path: value.astype(request.param) for path, value in draw(MODEL, MOE).items()}
    family, config = hf.config_of(MODEL, MOE, VOCAB, 64)
    out = tmp_path_factory.mktemp("checkpoint") / request.param
    hf.export(out, family, config, leaves.__getitem__)
    return out, leaves


def make_plan(
    mesh: dict[str, int], model: ModelConfig = MODEL, moe: MoEConfig = MOE, **options
) -> ServingPlan:
    config = MeshConfig(**mesh)
    placement = contiguous(count_moe_layers(model, moe), moe.num_experts, config.expert)
    return ServingPlan(
        model,
        moe,
        make_mesh(config, jax.devices()[: config.size]),
        placement,
        vocab_size=VOCAB,
        **options,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_file(
    folder: tuple[Path, dict[str, np.ndarray]], dtype: str
) -> None:
    """Bitwise: f32 and bf16 files as they are, bf16 in f32 exactly, and f32 rounded to bf16 to the
    nearest.
    """
    path, leaves = folder
    plan = make_plan({"expert": 2, "tensor": 2}, dtype=dtype)
    found = by_path(read_weights.read_params(plan, hf.open_checkpoint(path).leaf))
    for weight in plan.weights.values():
        array = found[weight.path if weight.order is None else f"{weight.path}/values"]
        wanted = leaves[weight.path]
        wanted = wanted if weight.order is None else wanted.transpose(weight.order)
        assert array.dtype == weight.dtype, weight.path
        np.testing.assert_array_equal(
            np.asarray(array), wanted.reshape(array.shape).astype(array.dtype), err_msg=weight.path
        )
    assert len(found) == len(plan.weights)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_each_byte_is_read_once_and_no_other(
    folder: tuple[Path, dict[str, np.ndarray]], mesh: dict[str, int]
) -> None:
    """By a process with all devices: what several hold alike is read for one of them."""
    path, leaves = folder
    checkpoint = hf.open_checkpoint(path)
    read_weights.read_params(make_plan(mesh), checkpoint.leaf)
    assert checkpoint.bytes_read == sum(leaf.nbytes for leaf in leaves.values())


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_process_reads_what_its_devices_hold(
    folder: tuple[Path, dict[str, np.ndarray]], mesh: dict[str, int], monkeypatch
) -> None:
    """As if each device were in a process of its own: the bytes of its share, in the type of the
    file.
    """
    path, leaves = folder
    plan = make_plan(mesh)
    itemsize = next(iter(leaves.values())).dtype.itemsize
    whole = jax.sharding.NamedSharding.addressable_devices_indices_map
    for device, held in memory.device_bytes(plan).items():

        def own(sharding, shape, device=device):
            return {device: whole(sharding, shape)[device]}

        monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", own)
        monkeypatch.setattr(
            jax, "make_array_from_single_device_arrays", lambda shape, sharding, arrays: arrays[0]
        )
        checkpoint = hf.open_checkpoint(path)
        parts = read_weights.read_params(plan, checkpoint.leaf)
        monkeypatch.undo()
        assert sum(part.nbytes for part in jax.tree.leaves(parts)) == held
        assert checkpoint.bytes_read <= 1.02 * held * itemsize / 4


@pytest.mark.parametrize("quantization", ["float", "int8", "int4"])
@pytest.mark.parametrize("mesh", [{}, {"expert": 2, "tensor": 2}], ids=str)
def test_devices_hold_what_was_planned(
    folder: tuple[Path, dict[str, np.ndarray]], mesh: dict[str, int], quantization: str
) -> None:
    plan = make_plan(mesh, quantization=quantization, group=4)
    found = jax.tree.leaves(read_weights.read_params(plan, hf.open_checkpoint(folder[0]).leaf))
    held = dict.fromkeys(plan.mesh.devices.flat, 0)
    for array in found:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert held == memory.device_bytes(plan)


@pytest.mark.parametrize("quantization", ["float", "int8", "int4"])
@pytest.mark.parametrize("cuts_banks", [True, False], ids=["banks in parts", "whole"])
def test_an_accelerator_that_shares_memory_holds_the_weights_and_one_tensor_more(
    quantization: str, cuts_banks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of host buffers that live and of a device that copies what it is given; of a model that
    is mostly experts.
    """
    model, moe = replace(MODEL, num_layers=9), replace(MOE, hidden=64)
    family, config = hf.config_of(model, moe, VOCAB, 64)
    hf.export(tmp_path / "model", family, config, draw(model, moe).__getitem__)
    plan = make_plan({}, model, moe, quantization=quantization, group=4, cuts_banks=cuts_banks)
    host, device, peaks = [0], [0], []
    aligned, put = read_weights._aligned, jax.device_put

    def counted(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        buffer = aligned(shape, dtype)
        host[0] += buffer.nbytes
        weakref.finalize(buffer, lambda: host.__setitem__(0, host[0] - buffer_size))
        buffer_size = buffer.nbytes
        return buffer

    def copied(array: np.ndarray, *where: Any) -> jax.Array:
        device[0] += array.nbytes
        peaks.append(host[0] + device[0])
        return put(array.copy(), *where)

    monkeypatch.setattr(read_weights, "_aligned", counted)
    monkeypatch.setattr(read_weights.jax, "device_put", copied)
    read_weights.read_params(plan, hf.open_checkpoint(tmp_path / "model").leaf)
    weights = sum(bytes_of(weight) for weight in plan.weights.values())
    assert (device[0], host[0]) == (weights, 0)
    assert max(peaks) <= loading_bytes(plan.weights)
    tensor = math.prod(plan.weights["embedding"].shape) * 4  # the largest
    assert (max(peaks) <= weights + tensor) == cuts_banks


@pytest.mark.parametrize("quantization", ["float", "int8", "int4"])
def test_tensors_in_pieces_give_the_same(
    folder: tuple[Path, dict[str, np.ndarray]], quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones are cut, those with the vocabulary last too, but an expert's; each byte is still
    read once.
    """
    plan = make_plan({}, quantization=quantization, group=4)
    whole = read_weights.read_params(plan, hf.open_checkpoint(folder[0]).leaf)
    monkeypatch.setattr(read_weights, "READ_AT_ONCE", 256)
    monkeypatch.setattr(read_weights, "QUANTIZED_AT_ONCE", 64)
    checkpoint, most = hf.open_checkpoint(folder[0]), [0]

    def read(path: str, index: tuple[Any, ...]) -> np.ndarray:
        part = checkpoint.leaf(path, index)
        if "experts" not in path:
            most[0] = max(most[0], part.size)
        return part

    pieces = read_weights.read_params(plan, read)
    jax.tree.map(np.testing.assert_array_equal, pieces, whole)
    assert 128 < most[0] <= 256
    assert checkpoint.bytes_read == sum(leaf.nbytes for leaf in folder[1].values())


def test_as_many_pieces_are_read_at_once_as_there_are_cores(
    folder: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three, which wait for one another here, and never a fourth; an error in one is raised."""
    monkeypatch.setattr(read_weights, "usable_cores", lambda: 3)
    leaf, together = hf.open_checkpoint(folder[0]).leaf, threading.Barrier(3)
    lock, now, most = threading.Lock(), [0], [0]

    def read(path: str, index: tuple[Any, ...]) -> np.ndarray:
        if not path.endswith("experts/down"):
            return leaf(path, index)
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:
            if index[0].start == 0 and index[1][0] < 6:
                together.wait(60)
            return leaf(path, index)
        finally:
            with lock:
                now[0] -= 1

    plan = make_plan({})
    read_weights.read_params(plan, read)
    assert most == [3] and not together.broken
    monkeypatch.setattr(read_weights, "READERS", 2)
    most[0] = 0
    with pytest.raises(threading.BrokenBarrierError):
        together.abort()
        read_weights.read_params(plan, read)
    assert most[0] <= 2


def test_packing_training_weights_gives_what_is_read(
    folder: tuple[Path, dict[str, np.ndarray]],
) -> None:
    plan = make_plan({"expert": 2}, quantization="int8")
    read = read_weights.read_params(plan, hf.open_checkpoint(folder[0]).leaf)
    packed = plan.pack(
        jax.tree.map(lambda a: jax.numpy.asarray(a.astype(np.float32)), nested(folder[1]))
    )
    for found, wanted in zip(jax.tree.leaves(read), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_a_mesh_of_more_devices_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"^--mesh expert=8,tensor=2 needs 16 devices and there are 8: .* --simulate 16\.$",
    ):
        open_model(tmp_path, mesh=MeshConfig(expert=8, tensor=2))


def test_on_a_mac_more_devices_are_no_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan({})
    with standing_in(METAL_ON_CPU), pytest.raises(UserError) as caught:
        memory.check_weight_memory(plan, 1)
    remedy = "--quantize int4, --dtype bfloat16, --expert-cache-size or a larger --memory."
    assert f"--memory allows 1 bytes: use {remedy}" in str(caught.value)
    monkeypatch.setattr(memory, "platform_of", lambda device: PLATFORMS["mps"])
    monkeypatch.setattr(memory.metal, "gpu_memory", lambda: 1000)
    assert memory.weight_memory(plan) == (memory.weight_memory(plan, 1).needed, 1000, False)


def test_what_does_not_fit_is_refused_before_it_is_read() -> None:
    plan = make_plan({"expert": 2})
    needed = max(memory.device_bytes(plan).values())
    memory.check_weight_memory(plan, needed)
    with pytest.raises(
        UserError,
        match=r"^The weights take 90\.1 KiB on each device and --memory allows [\d.]+ KiB: use "
        r"--quantize int4, --dtype bfloat16, a --mesh with more than 2 devices or a larger "
        r"--memory\.$",
    ):
        memory.check_weight_memory(plan, needed - 1)


@pytest.mark.parametrize(
    ("mesh", "options", "checked", "remedy"),
    [
        ({}, {"dtype": "bfloat16"}, {}, "--quantize int4, --expert-cache-size, a --mesh with"),
        ({}, {"quantization": "int8", "group": 4}, {}, "--quantize int4, --dtype bfloat16, --exp"),
        (
            {"expert": 2},
            {"dtype": "bfloat16", "quantization": "int4", "group": 4},
            {},
            "a --mesh with more than 2 devices or a larger",
        ),
        (
            {},
            {"dtype": "bfloat16"},
            {"expert_cache": 3},
            "--quantize int4, a smaller --expert-cache-size or a lar",
        ),
        ({}, {}, {"expert_cache": 2}, "--quantize int4, --dtype bfloat16 or a larger --memory"),
        (
            {"expert": 2},
            {"quantization": "int4", "group": 4},
            {"packs": True},
            "the folder that `moe-jax export` makes of the run, which is read in parts, a --mesh",
        ),
        ({"expert": 2}, {}, {"converted": True}, "the model converted again with --quantize int4"),
    ],
    ids=str,
)
def test_a_remedy_is_one_that_was_not_taken_and_helps(
    mesh: dict[str, int], options: dict, checked: dict, remedy: str
) -> None:
    with pytest.raises(UserError) as caught:
        memory.check_weight_memory(make_plan(mesh, **options), 1, **checked)
    assert f": use {remedy}" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "checked", "remedy"),
    [
        ({}, {}, "--quantize int4 or --dtype bfloat16."),
        ({}, {"expert_cache": 2}, "--quantize int4, --dtype bfloat16 or no --expert-cache-size."),
        ({"dtype": "bfloat16", "quantization": "int4", "group": 4}, {}, "a machine with more mem"),
    ],
    ids=str,
)
def test_simulated_devices_share_the_memory_of_their_machine(
    options: dict, checked: dict, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So more of them are no remedy."""
    monkeypatch.setattr(memory, "_free_memory", lambda: 100)
    with pytest.raises(UserError) as caught:
        memory.check_weight_memory(make_plan({"expert": 2}, **options), None, **checked)
    assert " in all and there are 100 bytes: use " + remedy in str(caught.value)


# Memory

LARGE = ModelConfig(
    num_layers=4,
    width=1024,
    num_heads=16,
    num_kv_heads=16,
    hidden=4096,
    qk_norm=False,
    tied_embeddings=False,
)
LARGE_VOCAB = 8192


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of 340 MB, in constants."""
    moe = MoEConfig(first_dense=LARGE.num_layers)
    family, config = hf.config_of(LARGE, moe, LARGE_VOCAB, 64)
    out = tmp_path_factory.mktemp("large") / "checkpoint"
    shapes = {path: leaf.shape for path, leaf in make_large_plan(moe).weights.items()}
    hf.export(out, family, config, lambda path: np.full(shapes[path], 0.5, np.float32))
    return out


def make_large_plan(moe: MoEConfig) -> ServingPlan:
    return ServingPlan(
        LARGE,
        moe,
        make_mesh(MeshConfig(), jax.devices()[:1]),
        contiguous(0, moe.num_experts, 1),
        vocab_size=LARGE_VOCAB,
    )


def test_a_context_beyond_the_models_is_allowed_and_said(tmp_path: Path, capsys) -> None:
    """With YaRN, Qwen's cards leave `max_position_embeddings` at less than it makes of the original
    length.
    """
    folder = make_folder("qwen3-yarn", tmp_path / "yarn", max_position_embeddings=40)
    loaded = open_model(folder)
    assert loaded.context == 128  # 4 x 32
    logits = loaded.session().logits([list(range(100))])
    assert np.isfinite(logits).all() and "was made for" not in capsys.readouterr().err
    longer = open_model(folder, context=200)
    assert longer.context == 200
    said = "yarn was made for 128 tokens: in a context of 200, what it gives beyond them may be"
    assert said in capsys.readouterr().err
    assert open_model(folder, context=64).context == 64
    assert "was made for" not in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory from /proc")
@pytest.mark.parametrize(
    ("tensor", "kind"), slow_unless((2, "float").__eq__, [(1, "float"), (2, "float"), (1, "int8")])
)
def test_the_peak_of_memory_is_the_share_and_one_tensor(
    large: Path, tensor: int, kind: str
) -> None:
    """The largest tensor is the embedding, or the head; 64 MB are for compiled programs and what
    malloc keeps.
    """
    done = run_module("memory_peak", large, tensor, kind)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    largest = LARGE_VOCAB * LARGE.width * 4
    assert grown["peak"] <= 1.15 * (grown["held"] + largest) + 64e6


def test_a_text_ends_where_the_config_the_tokenizer_or_the_template_says(tmp_path: Path) -> None:
    folder = make_folder("qwen3_moe-plain", tmp_path / "model", eos_token_id=5)

    def ends() -> tuple[int, ...]:
        options = {"dtype": None, "quantize": None, "group": 64, "step": None, "fallback": False}
        return load.find_model(folder, MeshConfig(), **options).eos_ids

    assert ends() == (5, 256)
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text())
    end = tokenizer["added_tokens"][0] | {"id": 257, "content": "<|im_end|>"}
    file.write_text(json.dumps(tokenizer | {"added_tokens": [*tokenizer["added_tokens"], end]}))
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": CHATML}))
    assert ends() == (5, 256, 257)
