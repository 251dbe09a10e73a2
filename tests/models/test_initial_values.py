"""Initial values drawn in parts are those of `jax.random.normal` drawn whole."""

from __future__ import annotations

import copy
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.models import initial_values
from moe_jax.models.transformer import Transformer
from moe_jax.profiling import hlo
from tests.support.tiny_programs import TINY_MODEL, TINY_MOE, VOCAB, lay_out, make_program


@pytest.mark.parametrize(
    ("shape", "start", "size"),
    [((5,), (2,), (3,)), ((4, 6), (0, 0), (4, 6)), ((3, 8, 2, 5), (1, 4, 0, 0), (1, 4, 2, 5))],
)
def test_a_part_is_that_part_of_the_whole_to_the_last_bit(shape, start, size):
    key = jax.random.key(3, impl=initial_values.PRNG)
    whole = jax.jit(lambda key: jax.random.normal(key, shape))(key)
    draw = jax.jit(partial(initial_values.normal_part, shape=shape, start=start, size=size))
    part = draw(jax.random.key_data(key))
    where = tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))
    np.testing.assert_array_equal(part, whole[where])


def test_elements_of_an_array_of_more_than_2_to_the_32_are_numbered():
    shape, start, size = (300, 7168, 4099), (297, 7166, 4096), (3, 2, 3)
    assert prod(shape) > 2 << 32
    halves = jnp.broadcast_arrays(*initial_values._element_numbers(shape, start, size))
    high, low = (np.asarray(half).astype(np.uint64) for half in halves)
    index = np.ix_(*(np.arange(at, at + n) for at, n in zip(start, size, strict=True)))
    expected = np.ravel_multi_index(np.broadcast_arrays(*index), shape).astype(np.uint64)
    np.testing.assert_array_equal((high << np.uint64(32)) + low, expected)


# Every sort of parameter, a pattern of two layers, tables with replicas and empty slots.
MODEL = dict(
    num_layers=3, window_every=2, sliding_window=4, qk_norm=True, qk_norm_over="width", sinks=True
)
MOE = dict(first_dense=1, expert_bias=True, shared_experts=1, num_experts=6)


@pytest.fixture(scope="module")
def whole() -> Any:
    """The parameters of a model drawn whole, experts in logical order, as numpy."""
    model, moe = ModelConfig(**TINY_MODEL | MODEL), MoEConfig(**TINY_MOE | MOE)

    @jax.jit
    def drawn():
        rngs = nnx.Rngs(params=jax.random.key(5))
        return nnx.to_pure_dict(nnx.state(Transformer(model, moe, VOCAB, rngs=rngs)))

    return jax.tree.map(np.asarray, drawn())


@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_parameters_on_a_mesh_are_those_of_a_model_drawn_whole(whole, mesh):
    program = make_program(*mesh, model=MODEL, moe=MOE, redundant=1)
    expected = lay_out(copy.deepcopy(whole), program.model, program.moe, program.placement)
    jax.tree.map(np.testing.assert_array_equal, program.init(5).params, expected)


def test_a_device_draws_its_own_share_alone():
    """No collective, and no more memory beside the state than one array's share."""
    program = make_program(
        2,
        4,
        model=dict(num_layers=8, width=64, tied_embeddings=False),
        moe=dict(hidden=256),
    )
    init = jax.jit(program._init, out_shardings=program.state_shardings)
    compiled = init.lower(jax.ShapeDtypeStruct((), jnp.uint32)).compile()
    assert not [entry for entry in hlo.collectives(compiled.as_text()) if entry.group > 1]
    bank = max(jax.tree.leaves(program.abstract_state.params), key=lambda leaf: leaf.size)
    assert compiled.memory_analysis().temp_size_in_bytes <= bank.size * 4 // 8
