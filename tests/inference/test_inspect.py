"""What a model takes on a mesh, from its headers: exact figures of a published model, and agreement
with what is loaded.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_jax import hf
from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.inference import convert, memory
from moe_jax.inference import inspect as module
from moe_jax.inference.inspect import Inspection, inspect
from moe_jax.inference.kv_cache import KVCache
from moe_jax.inference.load import open_model
from moe_jax.inference.memory import device_bytes
from moe_jax.model_io.source import find
from moe_jax.models.parameters import PARAMETER_KINDS, by_kind, kind_of
from moe_jax.runtime import platform
from moe_jax.utils.units import ranges
from tests.support import hf_cases as cases
from tests.support import tiny_run
from tests.support.command import call
from tests.support.hf_folder import make_folder

# As published with the model (https://huggingface.co/Qwen/Qwen3-30B-A3B).
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
TOTAL, ROUTERS, NORMS = 30_532_122_624, 48 * 2048 * 128, 48 * (2 * 2048 + 2 * 128) + 2048


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("Qwen3-30B-A3B")
    (folder / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    return folder


def total(column: dict[str, int] | None) -> int:
    assert column is not None
    return sum(column.values())


def test_qwen3_30b_a3b_in_bf16_is_exact(qwen: Path) -> None:
    found = inspect(find(qwen).describe(), dtype="bfloat16")
    assert (total(found.parameters), total(found.active)) == (TOTAL, 3_353_032_704)
    assert total(found.file_bytes) == 2 * TOTAL
    assert found.dtype == "bfloat16" and total(found.whole_bytes) == 2 * (
        TOTAL + ROUTERS + NORMS
    )  # both of which are held in f32
    assert found.cache_bytes_per_token == 48 * 2 * 4 * 128 * 2
    assert (
        found.parameters["experts"] == 48 * 128 * 3 * 2048 * 768
        and found.active["experts"] * 16 == found.parameters["experts"]
    )
    assert any("no tensor was checked" in note for note in found.notes)


def test_qwen3_30b_a3b_in_4_bits_is_17_gb_and_half_of_it_on_each_of_two(qwen: Path) -> None:
    one, two = (
        inspect(
            find(qwen).describe(), mesh=MeshConfig(expert=ranks), dtype="bfloat16", quantize="int4"
        )
        for ranks in (1, 2)
    )
    assert (
        round(total(one.held_bytes) / 1e9, 1) == 17.2
        and round(total(two.held_bytes) / 1e9, 1) == 8.6
    )
    experts, attention = 48 * 128 * 3 * 2048 * 768, 48 * 2048 * 128 * (2 * 32 + 2 * 4)
    scaled = (experts + attention) * (4 + 16 / 64) / 8
    assert total(one.held_bytes) == scaled + 2 * 2 * 151936 * 2048 + 4 * (ROUTERS + NORMS)
    assert total(two.held_bytes) == (scaled + 2 * 2 * 151936 * 2048) / 2 + 4 * (ROUTERS + NORMS)
    assert [entry.experts for entry in two.experts] == ["0-63", "64-127"]


def test_a_mesh_of_64_devices_needs_none(qwen: Path) -> None:
    found = inspect(
        find(qwen).describe(), mesh=MeshConfig(data=2, expert=8, tensor=4), context=8192, batch=3
    )
    assert [(entry.devices, entry.experts) for entry in found.experts][:2] == [
        ("0-3, 32-35", "0-15"),
        ("4-7, 36-39", "16-31"),
    ]
    assert found.held_bytes["experts"] * 32 == found.whole_bytes["experts"]
    # Queries and output are split over 32 devices, 4 key heads over tensor alone.
    parts = 2 * 32 / 32 + 2 * 4 / 4
    assert found.held_bytes["attention"] == found.whole_bytes["attention"] * parts / (2 * 32 + 8)
    assert (
        found.cache_bytes == found.cache_bytes_per_token // 4 * 2 * 8192
    )  # 3 sequences, 2 on each half of the mesh
    assert found.total_bytes == total(found.held_bytes) + found.cache_bytes


@pytest.mark.parametrize("case", cases.CASES)
def test_every_parameter_has_a_kind_and_every_byte_of_the_file_is_seen(
    case: str, tmp_path: Path
) -> None:
    folder = cases.build(case, tmp_path)
    found, checkpoint = inspect(find(folder).describe()), hf.open_checkpoint(folder)
    shapes = checkpoint.shapes()
    assert found.parameters == by_kind(shapes, lambda path: math.prod(shapes[path]))
    stored = sum(
        math.prod(shape) * (1 if name.endswith(("_blocks", "_scales")) else 4)
        for name, shape in cases.shapes(case).items()
    )
    assert checkpoint.bytes_read == 0
    bias_LE = checkpoint.bias_LE()
    assert total(found.file_bytes) == stored - (
        0 if bias_LE is None else bias_LE.nbytes
    )  # which is no parameter
    assert all(
        found.active[kind] <= count for kind, count in found.parameters.items()
    ) and found.parameters.keys() <= set(PARAMETER_KINDS)


@pytest.mark.parametrize(
    ("case", "mesh", "options"),
    [
        ("qwen3_moe-mixed", MeshConfig(expert=4), {"quantize": "int8"}),
        ("deepseek_v3-plain", MeshConfig(expert=2, tensor=2), {"dtype": "bfloat16"}),
        ("gpt_oss-plain", MeshConfig(data=2, tensor=2), {}),
    ],
)
def test_figures_are_those_of_the_loaded_model(
    case: str, mesh: MeshConfig, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_folder(case, tmp_path / "in")
    found = inspect(
        find(folder).describe(), mesh=mesh, context=200, batch=3, **{"dtype": "float32", **options}
    )
    loaded = open_model(folder, mesh=mesh, **{"dtype": "float32", **options})
    assert set(device_bytes(loaded.engine.plan).values()) == {total(found.held_bytes)}
    first = jax.devices()[0]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(loaded.engine.params)
        for shard in leaf.addressable_shards
        if shard.device == first
    )
    assert held == total(found.held_bytes)
    kept = KVCache(loaded.engine.layout, batch=3, context=200).reserve(200)
    cache = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(kept)
        for shard in leaf.addressable_shards
        if shard.device == first
    )
    assert cache == found.cache_bytes
    if case == "qwen3_moe-mixed":
        assert [(entry.experts, entry.empty_slots) for entry in found.experts] == [
            ("0-1", 0),
            ("2-3", 0),
            ("4-5", 0),
            ("none", 2),
        ]
        assert any("2 slots per layer stay empty" in note for note in found.notes)
    if case == "gpt_oss-plain":
        assert any("look back on" in note for note in found.notes)
    if case == "deepseek_v3-plain":
        latent = loaded.engine.plan.model.latent
        assert found.cache_bytes_per_token == 3 * (latent.kv_rank + latent.rope_width) * 2


def test_more_devices_than_experts_are_not_taken_without_a_word(tmp_path: Path) -> None:
    described = find(make_folder("qwen3_moe-mixed", tmp_path / "in")).describe()
    for ranks, words in (
        (64, "58 of the 64 devices along expert hold no expert: a layer has 6."),
        (4, "2 slots per layer stay empty, as the expert axis does not divide 6 experts."),
        (2, None),
    ):
        notes = inspect(described, mesh=MeshConfig(expert=ranks)).notes
        assert [note for note in notes if "expert" in note] == ([words] if words else [])


@pytest.mark.slow
def test_runs_configurations_and_converted_folders(folder: Path, tmp_path: Path) -> None:
    run = tiny_run.finished(folder)
    from_run, from_yaml = (
        inspect(find(path).describe()) for path in (run, tiny_run.config_file(folder))
    )
    assert from_run.parameters == from_yaml.parameters and from_run.file_bytes is None
    assert (from_run.context, from_run.dtype, from_run.source) == (32, "float32", "run")
    assert from_run.here is not None  # which reads f32 masters, whatever it holds them in
    small = inspect(find(run).describe(), quantize="int4", group=4).here
    assert small is not None and small.needed == from_run.here.needed
    convert.convert(
        run, tmp_path / "out", dtype=None, quantize="int8", group=64, step=None, fallback=False
    )
    found = inspect(find(tmp_path / "out").describe())
    assert found.quantization == "int8" and total(found.held_bytes) == sum(
        device_bytes(open_model(tmp_path / "out").engine.plan).values()
    )
    with pytest.raises(UserError, match=r"--dtype bfloat16 but .* was converted to float32"):
        inspect(find(tmp_path / "out").describe(), dtype="bfloat16")


def test_the_command(qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--mesh", "expert=2", "--dtype", "bfloat16", "--memory", "24GiB")
    assert call("inspect", qwen, *options, "--quantize", "int4") == 0
    out = capsys.readouterr().out
    assert "30,532,122,624" in out and "It fits: 9.90 GiB of 24.00 GiB" in out and "64-127" in out
    assert max(map(len, out.splitlines())) <= 80 and "\033" not in out and "\u2502" not in out
    assert call("inspect", qwen, *options, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (
        found["fits"] is False
        and found["parameters_total"] == TOTAL
        and found["file_bytes_total"] == 2 * TOTAL
    )
    assert (
        found["held_bytes_total"] + found["cache_bytes"] == found["total_bytes"]
        and found["experts"][1]["experts"] == "64-127"
    )
    assert set(Inspection._fields) <= found.keys()


def test_this_machine_is_what_generate_finds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The type of the weights, what they need and whether there is room; simulated devices share
    the machine's memory.
    """
    folder = make_folder("qwen3_moe-plain", tmp_path / "in", torch_dtype="bfloat16")
    mesh = MeshConfig(expert=2)
    found = inspect(find(folder).describe(), mesh=mesh)
    plan = open_model(folder, mesh=mesh).engine.plan
    assert found.dtype == plan.dtype.name == "float32"
    assert any("This machine holds weights in float32" in note for note in found.notes)
    needed = sum(device_bytes(plan).values())
    assert found.here is not None and found.here.shared and found.here.needed == needed
    for free, code in ((needed, 0), (needed - 1, 2)):
        monkeypatch.setattr(memory, "_free_memory", lambda free=free: free)
        assert call("inspect", folder, "--mesh", "expert=2") == 0
        said = "do not fit" if code else "fit"
        assert f"The weights {said} into this machine: " in capsys.readouterr().out
        assert call("inspect", folder, "--mesh", "expert=2", "--json") == 0
        assert json.loads(capsys.readouterr().out)["here"] == {
            "needed": needed,
            "free": free,
            "shared": True,
            "fits": not code,
        }
        options = ("--prompt", "a", "--max-tokens", "1", "--mesh", "expert=2")
        assert call("generate", folder, *options) == code
        err = capsys.readouterr().err
        assert ("The weights take" in err) == bool(code) and ("float32, loaded in" in err) != code


def test_an_accelerator_and_devices_that_cannot_be_asked(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dtype is the platform's; nothing is said about a machine with fewer devices."""
    described = find(qwen).describe()
    monkeypatch.setattr(module, "default_platform", lambda: platform.PLATFORMS["gpu"])
    found = inspect(described, mesh=MeshConfig(expert=8, tensor=4))
    assert found.dtype == "bfloat16" and found.here is None

    def busy() -> platform.Platform:
        raise RuntimeError("the TPU is in use by process 7")

    monkeypatch.setattr(module, "default_platform", busy)
    assert inspect(described, dtype="bfloat16").here is None
    with pytest.raises(UserError, match=r"in use by process 7\): give --dtype"):
        inspect(described)


def test_weights_that_fit_without_the_cache(qwen: Path) -> None:
    """Which `generate --memory` takes, too."""
    described = find(qwen).describe()
    whole = inspect(described, dtype="bfloat16", memory=1)
    for memory_bytes, fits in ((whole.total_bytes, True), (whole.total_bytes - 1, False)):
        found = inspect(described, dtype="bfloat16", memory=memory_bytes)
        assert found.fits is fits and found.here is None
        assert any("The weights alone fit" in note for note in found.notes) is not fits
    assert not any("The weights alone fit" in note for note in whole.notes)


def test_what_is_refused(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"")
    cut = make_folder("llama-plain", tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    for arguments, message in (
        ((tmp_path / "none",), "does not exist"),
        ((tmp_path / "empty",), "no config.json"),
        ((tmp_path / "pickles",), "never loaded"),
        ((tmp_path / "cut",), "truncated"),
        (
            (qwen, "--mesh", "tensor=3"),
            "--mesh tensor=3 does not divide the model's 32 query heads",
        ),
        ((qwen, "--mesh", "rows=3"), "--mesh 'rows=3'"),
        ((qwen, "--memory", "much"), "--memory 'much'"),
        ((qwen, "--dtype", "float8"), "--dtype 'float8'"),
        ((qwen, "--quantize", "int4", "--group", "100"), "groups of 100"),
        ((qwen, "--quantize", "int4", "--group", "48"), "use --group 32 or --quantize int8"),
        ((qwen, "--quantize", "int4", "--group", "3"), "--group 3 is odd"),
    ):
        assert call("inspect", *arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and out == ""


def test_ranges_and_kinds() -> None:
    assert (ranges([]), ranges([3]), ranges([5, 0, 1, 2, 7, 8])) == ("none", "3", "0-2, 5, 7-8")
    assert (
        kind_of("stacks/0/blocks/0/mlp/shared_gate") == "shared experts"
        and kind_of("stacks/0/blocks/0/mlp/down") == "dense feed-forward"
    )
    assert (
        kind_of("stacks/1/blocks/0/attention/query_norm/scale") == "norms"
        and kind_of("stacks/0/blocks/0/mlp/router/bias") == "routers"
    )
