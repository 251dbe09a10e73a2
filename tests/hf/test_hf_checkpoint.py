from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from moe_jax import hf
from moe_jax.errors import UserError
from moe_jax.hf import mxfp4
from moe_jax.models.transformer import Transformer
from tests.support.hf_cases import CASES, build, family

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def opened(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[hf.Checkpoint, Tensors]]:
    """A case's checkpoint and, read by another library, its tensors."""
    root, done = tmp_path_factory.mktemp("cases"), {}

    def open_case(case: str) -> tuple[hf.Checkpoint, Tensors]:
        if case not in done:
            folder = build(case, root / case)
            done[case] = hf.open_checkpoint(folder), load_file(folder / "model.safetensors")
        return done[case]

    return open_case


def test_every_family_has_a_case() -> None:
    assert {family(case) for case in CASES} == set(hf.FAMILIES)


@pytest.mark.parametrize("case", sorted({family(case): case for case in CASES}.values()))
def test_the_leaves_are_those_of_the_model(opened, case: str) -> None:
    checkpoint, _ = opened(case)

    def make():
        return Transformer(
            checkpoint.model,
            checkpoint.moe,
            checkpoint.vocab_size,
            rngs=nnx.Rngs(params=jax.random.key(0)),
        )

    tree = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make)))
    shapes = {
        "/".join(str(key.key) for key in path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    assert checkpoint.shapes() == shapes


def apart(row: np.ndarray, rotated: int) -> np.ndarray:
    """Rows of a head whose last ones alternate between the halves of a pair, put half after
    half.
    """
    plain, turned = row[:-rotated], row[-rotated:]
    return np.concatenate([plain, turned[0::2], turned[1::2]])


def test_dense_leaves_are_their_tensors_inputs_first(opened) -> None:
    checkpoint, tensors = opened("llama-plain")
    model = checkpoint.model
    heads, groups, width = model.num_heads, model.num_kv_heads, model.head_width
    for layer in range(model.num_layers):
        name, block = f"model.layers.{layer}.", "stacks/0/blocks/0/"
        query = tensors[name + "self_attn.q_proj.weight"].T.reshape(model.width, heads, width)
        np.testing.assert_array_equal(checkpoint.leaf(block + "attention/query")[layer], query)
        value = tensors[name + "self_attn.v_proj.weight"].T.reshape(model.width, groups, width)
        np.testing.assert_array_equal(checkpoint.leaf(block + "attention/value")[layer], value)
        out = tensors[name + "self_attn.o_proj.weight"].reshape(model.width, heads, width)
        np.testing.assert_array_equal(checkpoint.leaf(block + "attention/out")[layer], out)
        gate_up = np.stack(
            [tensors[name + f"mlp.{part}_proj.weight"].T for part in ("gate", "up")], axis=1
        )
        np.testing.assert_array_equal(checkpoint.leaf(block + "mlp/gate_up")[layer], gate_up)
        np.testing.assert_array_equal(
            checkpoint.leaf(block + "mlp/down")[layer], tensors[name + "mlp.down_proj.weight"]
        )
    np.testing.assert_array_equal(
        checkpoint.leaf("embedding"), tensors["model.embed_tokens.weight"].T
    )


def test_experts_are_stacked_in_their_order(opened) -> None:
    checkpoint, tensors = opened("mixtral-plain")
    gate_up, down = (
        checkpoint.leaf(f"stacks/0/blocks/0/mlp/experts/{name}") for name in ("gate_up", "down")
    )
    router = checkpoint.leaf("stacks/0/blocks/0/mlp/router/weight")
    for layer in range(checkpoint.model.num_layers):
        name = f"model.layers.{layer}.block_sparse_moe."
        np.testing.assert_array_equal(router[layer], tensors[name + "gate.weight"].T)
        for expert in range(checkpoint.moe.num_experts):
            np.testing.assert_array_equal(
                gate_up[layer, expert, :, 0], tensors[f"{name}experts.{expert}.w1.weight"].T
            )
            np.testing.assert_array_equal(
                gate_up[layer, expert, :, 1], tensors[f"{name}experts.{expert}.w3.weight"].T
            )
            np.testing.assert_array_equal(
                down[layer, expert], tensors[f"{name}experts.{expert}.w2.weight"]
            )


def test_alternating_pairs_of_latent_attention_are_put_half_after_half(opened) -> None:
    checkpoint, tensors = opened("deepseek_v3-plain")
    model, latent = checkpoint.model, checkpoint.model.latent
    query_up = checkpoint.leaf("stacks/0/blocks/0/attention/query_up")[0]
    rows = tensors["model.layers.0.self_attn.q_b_proj.weight"].reshape(
        model.num_heads, model.query_width, latent.q_rank
    )
    for head in range(model.num_heads):
        np.testing.assert_array_equal(query_up[:, head], apart(rows[head], latent.rope_width).T)
    kv_down = checkpoint.leaf("stacks/0/blocks/0/attention/kv_down")[0]
    np.testing.assert_array_equal(
        kv_down,
        apart(tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"], latent.rope_width).T,
    )
    bias_LE = checkpoint.bias_LE()
    assert bias_LE is not None and bias_LE.dtype == np.float32
    np.testing.assert_array_equal(
        bias_LE[0], tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    )
    assert opened("mixtral-plain")[0].bias_LE() is None


def test_pairs_that_are_half_a_head_apart_stay(opened) -> None:
    checkpoint, tensors = opened("deepseek_v3-halves")
    kv_down = tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].T
    np.testing.assert_array_equal(
        checkpoint.leaf("stacks/0/blocks/0/attention/kv_down")[0], kv_down
    )


def test_gate_and_up_of_gpt_oss_alternate(opened) -> None:
    checkpoint, tensors = opened("gpt_oss-plain")
    gate_up = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    bias = tensors["model.layers.1.mlp.experts.gate_up_proj_bias"]
    path = (
        "stacks/1/blocks/0/mlp/experts/gate_up"  # the second of three layers, whose windows differ
    )
    for half in (0, 1):
        np.testing.assert_array_equal(checkpoint.leaf(path)[0][:, :, half], gate_up[:, :, half::2])
        np.testing.assert_array_equal(checkpoint.leaf(path + "_bias")[0][:, half], bias[:, half::2])


def straightforward(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 a value at a time."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    out = np.zeros((*scales.shape, 32))
    for place in np.ndindex(*blocks.shape):
        for half, nibble in enumerate((int(blocks[place]) & 15, int(blocks[place]) >> 4)):
            sign = -1.0 if nibble & 8 else 1.0
            out[(*place[:-1], 2 * place[-1] + half)] = (
                sign * values[nibble & 7] * 2.0 ** (int(scales[place[:-1]]) - 127)
            )
    return out.reshape(*scales.shape[:-1], -1)


def test_mxfp4_is_decoded_exactly() -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 2, 16), dtype=np.uint8)
    scales = np.array(
        [[0, 127], [100, 140], [254, 120]], np.uint8
    )  # the ends of the range, and ordinary ones
    with np.errstate(over="ignore"):
        found = mxfp4.decode(blocks, scales)
    assert found.dtype == ml_dtypes.bfloat16
    wanted = straightforward(blocks, scales)
    finite = np.abs(wanted) < 3e38
    np.testing.assert_array_equal(found.astype(np.float64)[finite], wanted[finite])
    assert np.isnan(mxfp4.decode(blocks, np.full((3, 2), 255, np.uint8)).astype(np.float32)).all()


def test_mxfp4_leaves_and_their_parts(opened) -> None:
    checkpoint, tensors = opened("gpt_oss-mxfp4")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    rows = straightforward(
        tensors[name + "_blocks"], tensors[name + "_scales"]
    )  # [E, 2I, D], gate and up alternating
    path = next(path for path in checkpoint.shapes() if path.endswith("mlp/experts/gate_up"))
    whole = checkpoint.leaf(path)
    assert whole.dtype == ml_dtypes.bfloat16
    for half in (0, 1):
        np.testing.assert_array_equal(
            whole[0, :, :, half].astype(np.float64), rows[:, half::2].transpose(0, 2, 1)
        )
    index = (slice(0, 1), np.array([2, -1, 0]), slice(8, 40), slice(None), slice(3, 9))
    part = checkpoint.leaf(path, index)
    np.testing.assert_array_equal(part[:, [0, 2]], whole[:1, [2, 0]][:, :, 8:40, :, 3:9])
    assert not part[:, 1].any()


@pytest.mark.parametrize("case", CASES)
def test_a_part_of_a_leaf_is_read_from_its_own_bytes(opened, case: str) -> None:
    checkpoint, _ = opened(case)
    rng = np.random.default_rng(1)
    plain = "mxfp4" not in case
    for path, shape in checkpoint.shapes().items():
        before = checkpoint.bytes_read
        whole = checkpoint.leaf(path)
        assert whole.shape == shape and whole.dtype == checkpoint.dtype(path)
        if plain:
            assert checkpoint.bytes_read - before == whole.nbytes
        cuts = [sorted(rng.integers(0, size + 1, 2)) for size in shape]
        index = tuple(
            slice(first, max(last, first + 1) if first < size else size)
            for (first, last), size in zip(cuts, shape, strict=True)
        )
        before = checkpoint.bytes_read
        part = checkpoint.leaf(path, index)
        np.testing.assert_array_equal(part, whole[index])
        latent = (
            path.rsplit("/", 1)[-1] in ("query", "query_up", "kv_down", "kv_down_bias")
            and checkpoint.model.latent.kv_rank
        )
        if plain and not latent:  # rows that change places are read whole
            assert checkpoint.bytes_read - before == part.nbytes


def test_experts_are_picked_by_number_and_empty_slots_are_zeros(opened) -> None:
    checkpoint, _ = opened("qwen3_moe-plain")
    path = "stacks/0/blocks/0/mlp/experts/gate_up"
    whole, before = checkpoint.leaf(path), checkpoint.bytes_read
    part = checkpoint.leaf(
        path, (slice(None), np.array([5, -1, 2, 5]), slice(0, 8), slice(None), slice(None))
    )
    np.testing.assert_array_equal(part[:, [0, 2, 3]], whole[:, [5, 2, 5], :8])
    assert not part[:, 1].any()
    assert checkpoint.bytes_read - before == part.nbytes * 3 // 4
    assert part.transpose(
        0, 1, 3, 4, 2
    ).flags.c_contiguous  # outputs first is the order of the file


def test_an_index_that_is_no_slice_is_an_error(opened) -> None:
    checkpoint, _ = opened("llama-plain")
    with pytest.raises(ValueError, match="slice of step 1"):
        checkpoint.leaf("embedding", (np.array([0, 2]), slice(None)))
    with pytest.raises(ValueError, match="slice of step 1"):
        checkpoint.leaf("embedding", (slice(0, 4, 2), slice(None)))


# Folders that are not whole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build("llama-plain", tmp_path / "model")


def change(folder: Path, edit: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        hf.open_checkpoint(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bf16_is_read_as_bf16(folder: Path) -> None:
    before = hf.open_checkpoint(folder).leaf("stacks/0/blocks/0/attention/query")
    change(
        folder,
        lambda tensors: tensors.update(
            {name: a.astype(ml_dtypes.bfloat16) for name, a in tensors.items()}
        ),
    )
    after = hf.open_checkpoint(folder).leaf("stacks/0/blocks/0/attention/query")
    np.testing.assert_array_equal(after, before.astype(ml_dtypes.bfloat16))


def test_layers_of_different_types_meet_in_f32(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name].astype(ml_dtypes.bfloat16)}))
    down = hf.open_checkpoint(folder).leaf("stacks/0/blocks/0/mlp/down")
    assert down.dtype == np.float32
    np.testing.assert_array_equal(
        down[0], load_file(folder / "model.safetensors")[name].astype(np.float32)
    )


def test_missing_tensors_are_listed_but_not_dumped(folder: Path) -> None:
    change(
        folder,
        lambda tensors: [
            tensors.pop(name) for name in list(tensors) if "k_proj" in name or "v_proj" in name
        ],
    )
    says = refused(folder)
    assert (
        "lacks tensors" in says
        and "model.layers.0.self_attn.k_proj.weight" in says
        and " more: " in says
        and len(says) < 400
    )


def test_unexpected_tensors_are_listed(folder: Path) -> None:
    change(
        folder,
        lambda tensors: tensors.update({"model.layers.0.adapter.weight": np.zeros(3, np.float32)}),
    )
    assert "does not have, model.layers.0.adapter.weight:" in refused(folder)


def test_a_tensor_of_the_wrong_shape(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(7, np.float32)}))
    assert "model.norm.weight has the shape [7] where config.json calls for [" in refused(folder)


def test_a_tensor_of_a_type_that_is_not_read(folder: Path) -> None:
    change(
        folder,
        lambda tensors: tensors.update(
            {"model.norm.weight": np.ones(tensors["model.norm.weight"].shape, np.int32)}
        ),
    )
    assert "model.norm.weight has the type I32" in refused(folder)


def test_a_file_cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert "model.safetensors is truncated" in refused(folder)
    path.write_bytes(whole[:100])
    assert "model.safetensors is truncated" in refused(folder)
    path.write_bytes(b"PK\x03\x04")
    assert "is not a safetensors file" in refused(folder)
    path.write_bytes((10).to_bytes(8, "little") + b"{{{{{{{{{{")
    assert "header that cannot be read" in refused(folder)


def test_shards_by_their_index(folder: Path) -> None:
    whole = hf.open_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = hf.open_checkpoint(folder)
    assert sharded.shapes() == whole.shapes()
    np.testing.assert_array_equal(sharded.leaf("embedding"), tensors["model.embed_tokens.weight"].T)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refused(folder)
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "../elsewhere.safetensors, which is not" in refused(folder)


def test_pickles_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds neither" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "pickles (pytorch_model.bin), which are never loaded" in refused(folder)


def test_what_a_model_does_not_need_is_passed_over(folder: Path) -> None:
    shapes = hf.open_checkpoint(folder).shapes()
    buffers = {"model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"}
    change(
        folder, lambda tensors: tensors.update({name: np.zeros(4, np.float32) for name in buffers})
    )
    assert hf.open_checkpoint(folder).shapes() == shapes


def test_layers_that_predict_further_tokens_are_passed_over(tmp_path: Path) -> None:
    folder = build("deepseek_v3-plain", tmp_path)
    extra = {"model.layers.3.eh_proj.weight": np.zeros((2, 2), np.float32)}
    change(folder, lambda tensors: tensors.update(extra))
    assert "model.layers.3.eh_proj.weight" in refused(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    hf.open_checkpoint(folder)
