from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_jax.config.model import ModelConfig, MoEConfig, RopeConfig
from moe_jax.models.layer_pattern import (
    LayerKind,
    count_moe_layers,
    expert_layers,
    layer_kinds,
    stack_layers,
)
from tests.support.tiny_programs import LENGTH, VOCAB, make_batch, make_program

YARN = RopeConfig(scaling="yarn", factor=2.0, original_length=8)
DENSE, EXPERT = LayerKind(False, None), LayerKind(True, None)


def text(kinds) -> str:
    return "".join("m" if kind.moe else "d" for kind in kinds)


@pytest.mark.parametrize(
    ("moe", "pattern"),
    [
        ({}, "mmmmmm"),
        (dict(first_dense=1), "dmmmmm"),
        (dict(every=2), "dmdmdm"),
        (dict(first_dense=2, every=2), "dddmdm"),
        (dict(every=3), "ddmddm"),
        (dict(dense_layers=(0, 3)), "dmmdmm"),
        (dict(first_dense=6), "dddddd"),
    ],
)
def test_which_layers_have_experts(moe, pattern):
    model, config = ModelConfig(num_layers=6), MoEConfig(**moe)
    assert text(layer_kinds(model, config)) == pattern
    assert count_moe_layers(model, config) == pattern.count("m")


@pytest.mark.parametrize(
    ("window", "every", "windows"),
    [
        (None, 1, [None] * 4),
        (8, 1, [8] * 4),
        (8, 2, [8, None, 8, None]),
        (8, 4, [8, 8, 8, None]),
        (None, 2, [None] * 4),
    ],
)
def test_which_layers_have_a_window(window, every, windows):
    kinds = layer_kinds(
        ModelConfig(num_layers=4, sliding_window=window, window_every=every), MoEConfig()
    )
    assert [kind.window for kind in kinds] == windows


@pytest.mark.parametrize(
    ("layers", "stacks"),
    [
        ("mmmm", ["m x 4"]),
        ("dmmm", ["d x 1", "m x 3"]),
        ("dmdmdm", ["dm x 3"]),
        ("ddmddm", ["ddm x 2"]),
        ("dddmdmdm", ["d x 3", "md x 2", "m x 1"]),
        ("m", ["m x 1"]),
        ("dm", ["d x 1", "m x 1"]),
        ("", []),
    ],
)
def test_repeating_layers_are_stacked(layers, stacks):
    kinds = [EXPERT if letter == "m" else DENSE for letter in layers]
    found = stack_layers(kinds)
    assert [f"{text(pattern)} x {repeats}" for pattern, repeats in found] == stacks
    assert [kind for pattern, repeats in found for kind in pattern * repeats] == kinds


def test_weights_and_tables_of_a_layer_meet():
    """dmdmdm m: two MoE layers in turn, then one more."""
    model, moe = ModelConfig(num_layers=7), MoEConfig(dense_layers=(0, 2, 4))
    assert [text(p) + str(n) for p, n in stack_layers(layer_kinds(model, moe))] == ["dm3", "m1"]
    assert expert_layers(model, moe) == {(0, 1): [0, 1, 2], (1, 0): [3]}
    model, moe = ModelConfig(num_layers=6), MoEConfig(dense_layers=(0, 3))
    assert expert_layers(model, moe) == {(0, 1): [0, 2], (0, 2): [1, 3]}


@pytest.fixture(scope="module", params=["mixed", "dense"])
def model(request):
    """A window, patterns, untied embeddings, YaRN; on a mesh with all three axes; with and without
    experts.
    """
    moe = dict(first_dense=1, shared_experts=1) if request.param == "mixed" else dict(first_dense=3)
    settings = dict(
        num_layers=3,
        sliding_window=5,
        tied_embeddings=False,
        rope=YARN,
        num_heads=4,
        num_kv_heads=2,
    )
    program = make_program(2, 2, 2, moe=moe, model=settings)
    return program, program.init(1)


def last_logits(model, batch, last) -> np.ndarray:
    program, state = model
    return np.asarray(
        program.next_logits(
            state.params,
            state.tables,
            program.shard(batch),
            np.full(len(batch["tokens"]), last, np.int32),
        )
    )


def test_logits_see_their_own_document_up_to_here(model):
    batch = make_batch()
    half, last = LENGTH // 2, LENGTH // 2 + 1
    base = last_logits(model, batch, last)
    assert base.shape == (16, VOCAB)
    for change, seen in (
        (slice(last + 1, None), False),
        (slice(0, half), False),
        (slice(half, half + 1), True),
        (slice(last, last + 1), True),
    ):
        other = {**batch, "tokens": batch["tokens"].copy()}
        other["tokens"][:, change] = (other["tokens"][:, change] + 1) % VOCAB
        same = np.isclose(last_logits(model, other, last), base, atol=1e-6).all(axis=1)
        assert np.all(same != seen), change


@pytest.mark.slow
def test_a_training_step_of_any_pattern(model):
    program, _ = model
    state, batch = program.init(1), program.shard(make_batch())
    losses = []
    for _ in range(6):
        state, figures = program.train_step(state, batch)
        losses.append(float(figures.loss))
    assert losses[-1] < losses[0]
    assert (figures.layers is None) == (not program.has_moe)


def test_logits_agree_with_the_loss(model):
    program, state = model
    batch = make_batch()
    sequence = {name: a[:4] for name, a in batch.items()}
    total, _ = program.eval_step(state.params, state.tables, program.shard(sequence))
    losses = np.zeros((4, LENGTH))
    for at in range(LENGTH):
        logits = last_logits((program, state), sequence, at)
        top = logits.max(axis=1, keepdims=True)
        log_z = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
        losses[:, at] = log_z - logits[np.arange(4), sequence["targets"][:, at]]
    np.testing.assert_allclose((losses * sequence["mask"]).sum(), total, rtol=1e-5)


@pytest.mark.slow
def test_the_program_does_not_grow_with_depth():
    def size(layers: int) -> int:
        program = make_program(1, 2, moe=dict(every=2), model=dict(num_layers=layers))
        batch = program.shard(make_batch())
        return str(jax.make_jaxpr(program.train_step)(program.abstract_state, batch)).count(
            " = "
        )  # equations

    assert size(4) == size(12)


def step_figures(remat: str):
    program = make_program(1, 2, model=dict(remat=remat), moe=dict(capacity_factor=0.5))
    _, figures = program.train_step(program.init(2), program.shard(make_batch()))
    return figures


@pytest.fixture(scope="module")
def without_remat():
    return step_figures("none")


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.slow
def test_what_is_recomputed_changes_no_result(without_remat, remat):
    figures = step_figures(remat)
    assert figures.layers.rounds.max() > 1
    np.testing.assert_allclose(figures.loss, without_remat.loss, rtol=1e-6)
    np.testing.assert_allclose(figures.grad_norm, without_remat.grad_norm, rtol=1e-5)
