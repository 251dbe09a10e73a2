"""The model as training runs it, against what transformers computed for the same checkpoints: see
cases.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from moe_jax import hf
from moe_jax.config.schema import MeshConfig, OptimizerConfig
from moe_jax.models.batch import Batch
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.moe.tables import LayerTables, make_tables
from moe_jax.ops.cross_entropy import logits
from moe_jax.parallel.collectives import BATCH_AXES
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous
from moe_jax.training.step import TrainProgram
from tests.support import hf_cases as cases
from tests.support.hf_cases import TOLERANCE, assert_same


class Loaded(NamedTuple):
    """A case on one device."""

    program: TrainProgram
    params: Any
    tables: LayerTables
    forward: Callable[[Any, LayerTables, Batch], tuple[jax.Array, jax.Array | None]]


def load(folder: Path, aux_loss: bool = True) -> Loaded:
    """A checkpoint through the reader that every way in uses, whole."""
    checkpoint = hf.open_checkpoint(folder)
    moe = checkpoint.moe if aux_loss else dataclasses.replace(checkpoint.moe, aux_loss=0.0)
    placement = contiguous(count_moe_layers(checkpoint.model, moe), moe.num_experts, 1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    program = TrainProgram(
        checkpoint.model,
        moe,
        OptimizerConfig(),
        mesh,
        placement,
        vocab_size=checkpoint.vocab_size,
        steps=1,
    )
    tables, _ = make_tables(placement)
    bias_LE = checkpoint.bias_LE()
    tables = tables if bias_LE is None else tables._replace(bias_E=jax.numpy.asarray(bias_LE))
    return Loaded(
        program,
        jax.tree.map(jax.numpy.asarray, leaves(program, checkpoint)),
        tables,
        make_forward(program),
    )


def leaves(program: TrainProgram, checkpoint: hf.Checkpoint) -> Any:
    """The tree of parameters, f32."""

    def read(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        found = checkpoint.leaf("/".join(str(key.key) for key in path)).astype(np.float32)
        assert found.shape == like.shape, path
        return found

    return jax.tree.map_with_path(read, program.abstract_state.params)


def make_forward(
    program: TrainProgram,
) -> Callable[[Any, LayerTables, Batch], tuple[jax.Array, jax.Array | None]]:
    """Logits f32 [B, S, V], and how many choices each expert of each layer got [L, E]."""

    def local(params: Any, tables: LayerTables, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        model = nnx.merge(program.graph, params)
        hidden_BSD, stats = model(batch, tables)
        found_TV = logits(hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), model.head_weights())
        return found_TV.reshape(*batch.tokens.shape, -1), stats.router.load_E if stats else None

    specs = {
        "in_specs": (program.param_specs, P(), program.batch_spec),
        "out_specs": (P(BATCH_AXES, None, "tensor"), P()),
    }
    return jax.jit(jax.shard_map(local, mesh=program.mesh, **specs))


def make_batch(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of one text each, padded on the right from `lengths_B` on; the loss counts each token's
    successor in its row.
    """
    at_BS = np.broadcast_to(np.arange(tokens_BS.shape[1], dtype=np.int32), tokens_BS.shape)
    return {
        "tokens": tokens_BS,
        "targets": np.roll(tokens_BS, -1, axis=1),
        "positions": at_BS.copy(),
        "segments": (at_BS < lengths_B[:, None]).astype(np.int32),
        "mask": (at_BS < lengths_B[:, None] - 1).astype(np.float32),
    }


def run(
    loaded: Loaded, tokens_BS: np.ndarray, lengths_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    batch = loaded.program.shard(make_batch(tokens_BS, lengths_B))
    return jax.tree.map(np.asarray, loaded.forward(loaded.params, loaded.tables, batch))


# What the others have, one of these has too, or it concerns the reader alone: test_decoding.py has
# all cases.
LIKE_OTHERS = {
    *(
        "deepseek_v2-dense",
        "deepseek_v2-lite",
        "deepseek_v3-direct",
        "gpt_oss-mxfp4",
        "llama-linear",
        "llama-plain",
        "mistral-window",
    ),
    *(
        "mixtral-dynamic",
        "olmoe-linear",
        "olmoe-plain",
        "qwen2_moe-window",
        "qwen3-yarn",
        "qwen3_moe-sparse",
    ),
}


@pytest.fixture(scope="module", params=[case for case in cases.CASES if case not in LIKE_OTHERS])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Loaded, dict[str, np.ndarray]]:
    return load(cases.build(request.param, tmp_path_factory.mktemp(request.param))), cases.expected(
        request.param
    )


def test_logits(case: tuple[Loaded, dict[str, np.ndarray]]) -> None:
    loaded, wanted = case
    tokens = wanted["tokens"]
    found, _ = run(loaded, tokens, np.full(len(tokens), tokens.shape[1]))
    assert_same(found[0], wanted["logits"])
    assert_same(found[:, -1], wanted["last"])


def test_logits_of_a_padded_batch(case: tuple[Loaded, dict[str, np.ndarray]]) -> None:
    loaded, wanted = case
    found, _ = run(loaded, wanted["tokens"], wanted["lengths"])
    assert_same(found[np.arange(len(found)), wanted["lengths"] - 1], wanted["right"])


def test_chosen_experts(case: tuple[Loaded, dict[str, np.ndarray]]) -> None:
    """A token's experts are those whose load grows by one when the text grows by the token. Some
    models have none.
    """
    loaded, wanted = case
    assert ("experts" in wanted) == (count_moe_layers(loaded.program.model, loaded.program.moe) > 0)
    if "experts" not in wanted:
        return
    tokens = wanted["tokens"]
    loads_SLE = np.stack(
        [
            run(loaded, tokens, length * (np.arange(len(tokens)) == 0))[1]
            for length in range(tokens.shape[1] + 1)
        ]
    )
    chosen_SLE = np.diff(loads_SLE, axis=0)
    wanted_SLE = np.zeros_like(chosen_SLE)
    np.put_along_axis(wanted_SLE, wanted["experts"].transpose(1, 0, 2).astype(np.int64), 1, axis=-1)
    np.testing.assert_array_equal(chosen_SLE, wanted_SLE)


@pytest.mark.parametrize("ending", ["", "_without"], ids=["with-auxiliary-loss", "without"])
@pytest.mark.parametrize("name", cases.TRAINED)
def test_training_step(name: str, ending: str, tmp_path: Path) -> None:
    loaded, wanted = (
        load(cases.build(name, tmp_path / "weights"), aux_loss=not ending),
        cases.expected(name),
    )
    program, params, tables, _ = loaded
    step = jax.jit(program.gradients)
    rows, size = wanted["tokens"].shape
    batch = program.shard(make_batch(wanted["tokens"], np.full(rows, size)))
    gradients, figures = step(params, batch, tables, jax.random.key(0))
    np.testing.assert_allclose(figures.loss, wanted[f"loss{ending}"], rtol=TOLERANCE)
    hub = in_hub_layout(name, program, gradients, tmp_path / "numbers")
    scale = wanted[f"norms{ending}"].max()
    for number, tensor in enumerate(sorted(hub)):
        assert (
            abs(np.linalg.norm(hub[tensor]) - wanted[f"norms{ending}"][number]) <= TOLERANCE * scale
        ), tensor
        assert (
            np.abs(cases.sample(hub[tensor]) - wanted[f"entries{ending}"][number]).max()
            <= TOLERANCE * scale
        ), tensor


def in_hub_layout(
    name: str, program: TrainProgram, tree: Any, folder: Path
) -> dict[str, np.ndarray]:
    """A tree like the parameters as the tensors of a checkpoint.

    Reading a checkpoint whose entries are all numbered tells where each entry of the tree belongs.
    """
    shapes = dict(sorted(cases.shapes(name).items()))
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
    number = partial(np.arange, dtype=np.float32)
    cases.build(name, folder)
    parts = zip(shapes.items(), ends, strict=True)
    save_file(
        {
            tensor: number(end - np.prod(shape), end).reshape(shape)
            for (tensor, shape), end in parts
        },
        folder / "model.safetensors",
    )
    numbers = leaves(program, hf.open_checkpoint(folder))
    flat = np.full(ends[-1], np.nan)
    for at, values in zip(jax.tree.leaves(numbers), jax.tree.leaves(tree), strict=True):
        flat[at.astype(np.int64)] = values
    pieces = np.split(flat, ends[:-1])
    return {
        tensor: piece.reshape(shape)
        for (tensor, shape), piece in zip(shapes.items(), pieces, strict=True)
    }
