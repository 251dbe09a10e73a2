"""Small models of different kinds for tests of inference, and what the training program makes of
them on one device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config.model import LatentConfig, ModelConfig, MoEConfig
from moe_jax.config.schema import MeshConfig, OptimizerConfig
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.inference.engine import ResidentEngine
from moe_jax.inference.offload import offload
from moe_jax.inference.read_weights import read_params, serving_tables
from moe_jax.inference.session import LoadedModel
from moe_jax.models.batch import NewTokens
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.paths import nested
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.models.transformer import Transformer
from moe_jax.moe.tables import make_tables
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import Placement, contiguous
from moe_jax.training.step import TrainProgram

VOCAB = 48
PROMPTS = (5, 3)  # tokens of the two rows' prompts
LENGTH = 10  # and of the texts, which go on greedily

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # experts that 4 and 8 ranks do not divide, a dense layer, shared experts (that 8 ranks do not
    # divide) behind a gate
    "experts": (
        dict(num_layers=3, num_heads=8, num_kv_heads=4),
        dict(
            num_experts=6,
            top_k=2,
            first_dense=1,
            shared_experts=2,
            shared_hidden=20,
            shared_gate=True,
        ),
    ),
    # as gpt-oss: biases everywhere, sinks, a window in every other layer, clamped experts; heads
    # that 4 ranks do not divide
    "biases": (
        dict(
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            qk_norm=False,
            qkv_bias=True,
            out_bias=True,
            sinks=True,
        )
        | dict(sliding_window=3, window_every=2, tied_embeddings=False),
        dict(num_experts=4, top_k=2, router_bias=True, expert_bias=True, swiglu_limit=1.0),
    ),
    # as DeepSeek-V3: latent attention, groups of experts chosen by a biased sigmoid, a plain shared
    # expert
    "latent": (
        dict(num_layers=3, num_heads=4, num_kv_heads=4, head_dim=6, qk_norm=False)
        | dict(latent=LatentConfig(kv_rank=12, q_rank=12, rope_width=4, value_width=8)),
        dict(
            num_experts=8,
            top_k=2,
            first_dense=1,
            score="sigmoid",
            num_groups=4,
            top_groups=2,
            routed_scale=1.5,
            shared_experts=1,
        ),
    ),
    # no experts; norms over all heads, clamped queries, keys and values
    "dense": (
        dict(
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            qk_norm_over="width",
            clip_qkv=1.0,
            mlp_bias=True,
            tied_embeddings=False,
        ),
        dict(first_dense=2),
    ),
}


class Case(NamedTuple):
    """A model, its weights as a checkpoint would hold them, and what is right."""

    model: ModelConfig
    moe: MoEConfig
    leaves: dict[str, np.ndarray]  # by path, experts in logical order
    bias_LE: np.ndarray
    texts: np.ndarray  # i32 [2, LENGTH]
    logits: np.ndarray  # f32 [2, LENGTH, V], after each token

    def read(self, path: str, index: tuple[Any, ...]) -> np.ndarray:
        """What `read_params` asks of a checkpoint."""
        whole = self.leaves[path]
        if len(index) > 1 and isinstance(index[1], np.ndarray):
            picked = np.where(
                (index[1] >= 0).reshape(1, -1, *(1,) * (whole.ndim - 2)), whole[:, index[1]], 0
            )
            return picked[(index[0], slice(None), *index[2:])]
        return whole[index]


@functools.cache
def case(name: str) -> Case:
    model_options, moe_options = MODELS[name]
    model = ModelConfig(**dict(width=32, hidden=32) | model_options)
    moe = MoEConfig(**dict(hidden=16, dropless=True) | moe_options)
    leaves = draw(model, moe)
    layers = count_moe_layers(model, moe)
    bias_LE = (
        np.random.default_rng(9).uniform(-0.2, 0.2, (layers, moe.num_experts)).astype(np.float32)
    )
    texts, logits = greedy_texts(model, moe, leaves, bias_LE)
    return Case(model, moe, leaves, bias_LE, texts, logits)


def draw(
    model: ModelConfig, moe: MoEConfig, vocab: int = VOCAB, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random weights with which scores, routing and logits spread; biases and norms are not what
    they start training with.
    """
    rng, found = np.random.default_rng(seed), {}
    abstract = nnx.eval_shape(lambda: Transformer(model, moe, vocab, rngs=nnx.Rngs(0)))
    for keys, variable in nnx.to_flat_state(nnx.state(abstract)):
        shape, axes = variable.get_value().shape, variable.get_metadata("axes")
        inner, noise = (
            shape[len(shape) - len(axes) :],
            rng.standard_normal(shape).astype(np.float32),
        )
        if keys[-1] == "scale":
            value = 1 + np.float32(0.2) * noise
        elif keys[-1] in ("bias", "sinks") or str(keys[-1]).endswith("_bias"):
            value = np.float32(0.3) * noise
        elif keys[-1] == "embedding":
            value = noise
        else:
            inputs = (
                math.prod(inner[1 + (axes[0] == "slots") :])
                if keys[-1] in ("out", "down", "shared_down")
                else inner[axes[0] == "slots"]
            )
            value = np.float32(1.2 / math.sqrt(inputs)) * noise
        found["/".join(map(str, keys))] = value
    return found


def greedy_texts(
    model: ModelConfig, moe: MoEConfig, leaves: dict[str, np.ndarray], bias_LE: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Texts that the training program would write, and its logits after each of their tokens."""
    placement = contiguous(count_moe_layers(model, moe), moe.num_experts, 1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    program = TrainProgram(
        model, moe, OptimizerConfig(), mesh, placement, vocab_size=VOCAB, steps=1
    )
    tables = make_tables(placement)[0]._replace(bias_E=jnp.asarray(bias_LE))
    params = jax.tree.map(jnp.asarray, nested(leaves))
    texts = np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
    last_B = np.tile(
        np.arange(LENGTH, dtype=np.int32), 2
    )  # each text once for each of its positions

    def logits() -> np.ndarray:
        rows = np.repeat(texts, LENGTH, axis=0)
        whole = np.ones_like(rows)
        positions = np.tile(np.arange(LENGTH, dtype=np.int32), (len(rows), 1))
        parts = {
            "tokens": rows,
            "targets": rows,
            "positions": positions,
            "segments": whole,
            "mask": whole.astype(np.float32),
        }
        return np.asarray(
            program.next_logits(params, tables, program.shard(parts), last_B)
        ).reshape(2, LENGTH, VOCAB)

    for place in range(min(PROMPTS), LENGTH):
        best = logits()[:, place - 1].argmax(-1)
        for row, prompt in enumerate(PROMPTS):
            if place >= prompt:
                texts[row, place] = best[row]
    return texts, logits()


def make_plan(
    case: Case, mesh: dict[str, int], *, placement: Placement | None = None, **options: Any
) -> ServingPlan:
    layers = count_moe_layers(case.model, case.moe)
    placement = placement or contiguous(layers, case.moe.num_experts, mesh.get("expert", 1))
    config = MeshConfig(**mesh)
    return ServingPlan(
        case.model,
        case.moe,
        make_mesh(config, jax.devices()[: config.size]),
        placement,
        vocab_size=VOCAB,
        **options,
    )


def load(case: Case, mesh: dict[str, int], context: int = 64, **options: Any) -> LoadedModel:
    """The case as `open_model` would give it."""
    plan = make_plan(case, mesh, **options)
    engine = ResidentEngine(plan, read_params(plan, case.read), serving_tables(plan, case.bias_LE))
    return LoadedModel(engine, load_tokenizer("bytes"), context, (VOCAB - 1,), "case")


def load_offloaded(data: Case, size: int, **options: Any) -> LoadedModel:
    """The same with `size` experts per layer on the device."""
    plan = make_plan(data, {}, **options)
    params = read_params(plan, data.read, experts_on_host=True)
    engine = offload(plan, params, serving_tables(plan, data.bias_LE), size)
    return LoadedModel(engine, load_tokenizer("bytes"), 64, (), "offloaded")


def new_tokens(rows: list[Any], start: Any, width: int) -> NewTokens:
    """New tokens of each row after `start` earlier ones, padded to `width`."""
    tokens = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    arrays: Any = tokens, np.asarray(start, np.int32), lengths
    return NewTokens(*arrays)


def assert_same(found: Any, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    """Equal up to a share of the largest entry, and the same tokens are likeliest."""
    found = np.asarray(found)
    assert found.shape == wanted.shape and found.dtype == np.float32
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
    np.testing.assert_array_equal(found.argmax(-1), wanted.argmax(-1))


def with_options(case: Case, **moe: Any) -> Case:
    """The same weights under other settings that do not change what is right."""
    return case._replace(moe=dataclasses.replace(case.moe, **moe))
