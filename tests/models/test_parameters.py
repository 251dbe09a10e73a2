"""The table of parameters is that of the modules: shapes, layers and what each array is."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from moe_jax.config.model import LatentConfig, ModelConfig, MoEConfig
from moe_jax.models.layer_pattern import layer_kinds
from moe_jax.models.parameters import PARAMETER_KINDS, by_kind, kind_of, parameters
from moe_jax.models.paths import ParameterPath
from moe_jax.models.transformer import Transformer

# A dense layer, then three alike, then one with a window of its own.
MODEL = ModelConfig(
    num_layers=5,
    tied_embeddings=False,
    width=16,
    hidden=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    qkv_bias=True,
    sinks=True,
    sliding_window=8,
    full_layers=(1, 2, 3),
)
MOE = MoEConfig(num_experts=6, top_k=2, hidden=8, first_dense=1, shared_experts=1, router_bias=True)


def test_shapes_are_those_of_the_modules_and_layers_count_through_all_stacks() -> None:
    table = parameters(MODEL, MOE, 32)
    model = nnx.eval_shape(lambda: Transformer(MODEL, MOE, 32, rngs=nnx.Rngs(0)))
    tree = nnx.to_pure_dict(nnx.state(model))
    shapes = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf.shape
        for keys, leaf in jax.tree.leaves_with_path(tree)
    }
    assert {path: parameter.stacked_shape for path, parameter in table.items()} == shapes
    assert parameters(MODEL, MOE, 32) is table
    routers = [one.layers for one in table.values() if one.path.within == "mlp/router/weight"]
    moe_layers = [number for number, kind in enumerate(layer_kinds(MODEL, MOE)) if kind.moe]
    assert (
        sorted(layer for layers in routers for layer in layers or ()) == moe_layers == [1, 2, 3, 4]
    )
    assert (1, 2, 3) in routers and table["embedding"].layers is None


def test_axes_name_every_dim() -> None:
    table = parameters(MODEL, MOE, 32)
    for parameter in table.values():
        assert len(parameter.axes) == len(parameter.shape) == len(set(parameter.axes))
    down = next(one for one in table.values() if one.path.within == "mlp/experts/down")
    assert dict(zip(down.axes, down.shape, strict=True)) == {
        "slots": 6,
        "slot_width": 16,
        "expert_hidden": 8,
    }
    assert down.active_size(MOE) * 3 == down.size and table["embedding"].active_size(MOE) == 16 * 32


def test_every_parameter_has_a_kind() -> None:
    table = parameters(MODEL, MOE, 32)
    sizes = by_kind(table, lambda path: table[path].size)
    assert list(sizes) == list(PARAMETER_KINDS)
    assert sum(sizes.values()) == sum(parameter.size for parameter in table.values())
    assert {kind_of(path) for path, one in table.items() if one.path.is_expert} == {"experts"}


def test_a_matrix_says_which_of_its_dims_is_the_output() -> None:
    table = parameters(MODEL, MOE, 32).values()
    first = {one.path.within for one in table if one.path.is_output_first}
    assert first == {"attention/out", "mlp/down", "mlp/experts/down", "mlp/shared_down"}
    latent = LatentConfig(kv_rank=8, q_rank=8, rope_width=2, value_width=4)
    model = ModelConfig(
        num_layers=1, width=16, num_heads=2, num_kv_heads=2, latent=latent, qk_norm=False
    )
    table = parameters(model, MoEConfig(first_dense=1), 32).values()
    assert {one.path.within for one in table if one.path.is_output_first} == {
        "attention/out",
        "mlp/down",
    }


def test_a_moment_has_the_path_of_its_parameter_behind_a_prefix() -> None:
    path = ParameterPath.parse("opt_state/0/mu/stacks/1/blocks/0/mlp/experts/down")
    assert (path.prefix, path.parameter) == (
        "opt_state/0/mu/",
        "stacks/1/blocks/0/mlp/experts/down",
    )
    assert path.dense_counterpart == "mlp/down" and path.is_expert and path.layer_block == (1, 0)
    plain = ParameterPath.parse("params/stacks/0/blocks/0/attention/query_bias")
    assert (plain.prefix, plain.is_matrix) == ("params/", False)
    assert np.array_equal(plain.layer_block, (0, 0))
